// Runs a fuzz target without libFuzzer: every file of a folder, then random mutations of them.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;

// characters that mean something in a header
constexpr unsigned char kTelling[] = "0123456789(){},:' \n<f8i";

std::vector<Bytes> read_folder(const char* folder) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) paths.push_back(entry.path());
  // the order of a folder is not defined, and the mutations depend on it
  std::sort(paths.begin(), paths.end());
  std::vector<Bytes> inputs;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return inputs;
}

Bytes mutated(Bytes bytes, std::mt19937_64& random) {
  const auto below = [&](std::size_t limit) { return static_cast<std::size_t>(random() % limit); };
  for (std::size_t changes = 1 + below(4); changes > 0 && !bytes.empty(); --changes) {
    const std::size_t at = below(bytes.size());
    const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(6)) {
      case 0: *place = static_cast<std::uint8_t>(random()); break;
      case 1: *place ^= static_cast<std::uint8_t>(1u << below(8)); break;
      case 2: *place = kTelling[below(sizeof(kTelling) - 1)]; break;
      case 3: bytes.erase(place, bytes.end() - static_cast<std::ptrdiff_t>(below(bytes.size() - at))); break;
      case 4: bytes.insert(place, 1 + below(8), static_cast<std::uint8_t>(random())); break;
      default: bytes.resize(at); break;
    }
  }
  return bytes;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: run_corpus FOLDER MUTATIONS\n");
    return 2;
  }
  const std::vector<Bytes> inputs = read_folder(arguments[1]);
  if (inputs.empty()) {
    std::fprintf(stderr, "run_corpus: FOLDER must hold inputs, got none in %s\n", arguments[1]);
    return 2;
  }
  for (const Bytes& input : inputs) LLVMFuzzerTestOneInput(input.data(), input.size());
  std::mt19937_64 random(1);
  const long mutations = std::strtol(arguments[2], nullptr, 10);
  for (long i = 0; i < mutations; ++i) {
    const Bytes input = mutated(inputs[static_cast<std::size_t>(random() % inputs.size())], random);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%zu inputs, %ld mutations\n", inputs.size(), mutations);
  return 0;
}
