#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <stdexcept>

#include "check.h"
#include "core/clips.h"

namespace fastskel_tests {

namespace {

std::mutex mutex;
long checks = 0, failures = 0;

}  // namespace

void check(bool ok, const std::string& what) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++checks;
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
}

void check_error(const std::function<void()>& call, const std::string& text) {
  try {
    call();
    check(false, "no error where one says: " + text);
  } catch (const fastskel::Error& error) {
    check(std::string(error.what()).find(text) != std::string::npos, text + ", but: " + error.what());
  }
}

long num_checks() { return checks; }
long num_failures() { return failures; }

Folder::Folder() {
  std::string name = (std::filesystem::temp_directory_path() / "fastskel-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no folder for temporary files");
  path_ = name;
}

Folder::~Folder() { std::filesystem::remove_all(path_); }

std::string npy(const std::string& descr, const std::string& shape, const std::string& values, char version) {
  std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }";
  const std::size_t prefix = version == 1 ? 10 : 12;
  header.append(64 - (prefix + header.size() + 1) % 64, ' ');
  header += '\n';
  std::string bytes = "\x93NUMPY";
  bytes += version;
  bytes += '\0';
  for (std::size_t i = 0; i < prefix - 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 0xFF);
  return bytes + header + values;
}

void write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

}  // namespace fastskel_tests

int main() {
  fastskel_tests::test_bounds();
  fastskel_tests::test_clips();
  fastskel_tests::test_cpu_count();
  fastskel_tests::test_sampler();
  fastskel_tests::test_stream();
  fastskel_tests::test_views();
  std::printf("%ld checks, %ld failed\n", fastskel_tests::num_checks(), fastskel_tests::num_failures());
  return fastskel_tests::num_failures() == 0 ? 0 : 1;
}
