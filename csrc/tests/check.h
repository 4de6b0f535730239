// What the tests of the core share: counting failures, and folders that vanish.
#pragma once

#include <filesystem>
#include <functional>
#include <string>

namespace fastskel_tests {

// counts and prints what does not hold
void check(bool ok, const std::string& what);
// checks that the call throws fastskel::Error with this text in its message
void check_error(const std::function<void()>& call, const std::string& text);
// checks so far, of which failed
long num_checks();
long num_failures();

class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// contents of a .npy file
std::string npy(const std::string& descr, const std::string& shape, const std::string& values, char version = 1);
void write(const std::string& path, const std::string& bytes);
// memory of numbers as text
template <typename T>
std::string bytes_of(const T* values, std::size_t num) {
  return {reinterpret_cast<const char*>(values), num * sizeof(T)};
}

void test_bounds();
void test_clips();
void test_cpu_count();
void test_sampler();
void test_stream();
void test_views();

}  // namespace fastskel_tests
