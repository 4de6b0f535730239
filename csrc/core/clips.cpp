#include "core/clips.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <utility>

#include "core/npy.h"

namespace fastskel {

namespace {

[[noreturn]] void fail(const char* function, const std::string& path, const std::string& contract, int error) {
  throw Error(std::string(function) + ": file must be " + contract + ", got " + std::strerror(error) + ", in " + path +
              ". Pack the data again.");
}

std::vector<unsigned char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  // a folder opens, and says that it is as long as can be
  struct stat status {};
  if (size < 0 || ::stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) {
    fail("Clips.open", path, "readable", errno != 0 ? errno : EINVAL);
  }
  std::vector<unsigned char> bytes(static_cast<std::size_t>(size));
  file.seekg(0);
  if (size > 0 && !file.read(reinterpret_cast<char*>(bytes.data()), size)) fail("Clips.open", path, "readable", EIO);
  return bytes;
}

}  // namespace

// a file in memory, read only; the open file keeps its contents where the name is removed
struct Clips::Map {
  explicit Map(const std::string& name) : path(name), file(::open(name.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat status {};
    if (file < 0 || ::fstat(file, &status) != 0) stop("readable", errno);
    if (!S_ISREG(status.st_mode)) stop("a regular file", EINVAL);
    // an empty map is refused by the system; the parser says better what is wrong with an empty file
    size = static_cast<std::size_t>(status.st_size);
    if (size == 0) return;
    void* memory = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) stop("mappable", errno);
    bytes = static_cast<const unsigned char*>(memory);
  }
  ~Map() {
    if (bytes != nullptr) ::munmap(const_cast<unsigned char*>(bytes), size);
    ::close(file);
  }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;

  std::string path;
  int file = -1;
  std::size_t size = 0;
  const unsigned char* bytes = nullptr;

 private:
  // the destructor of an object that was never complete does not run
  [[noreturn]] void stop(const char* contract, int error) const {
    if (file >= 0) ::close(file);
    fail("Clips.open", path, contract, error);
  }
};

Clips Clips::open(const std::string& frames_path, const std::string& offsets_path) {
  auto map = std::make_shared<const Map>(frames_path);
  const PackedFrames frames = parse_frames(map->bytes, map->size, frames_path);
  const std::vector<unsigned char> bytes = read_file(offsets_path);
  Clips clips;
  clips.offsets_ = parse_offsets(bytes.data(), bytes.size(), offsets_path);
  check_offsets(clips.offsets_, frames.num_frames, offsets_path);
  clips.frames_ = reinterpret_cast<const float*>(map->bytes + frames.begin);
  clips.shape_ = frames.shape;
  clips.map_ = std::move(map);
  return clips;
}

Clips Clips::borrow(const float* frames, std::int64_t num_frames, FrameShape shape, std::vector<std::int64_t> offsets) {
  check_offsets(offsets, num_frames, "memory");
  Clips clips;
  clips.frames_ = frames;
  clips.shape_ = shape;
  clips.offsets_ = std::move(offsets);
  return clips;
}

ClipSpan Clips::clip(std::int64_t number) const {
  if (number < 0 || number >= size()) {
    throw Error("Clips.clip: number must be in range(" + std::to_string(size()) + "), got " + std::to_string(number) +
                    ". Choose another.",
                number);
  }
  const std::int64_t first = offsets_[static_cast<std::size_t>(number)];
  return {frames_ + first * shape_.size(), offsets_[static_cast<std::size_t>(number) + 1] - first};
}

void Clips::check_unchanged() const {
  if (map_ == nullptr) return;
  struct stat status {};
  if (::fstat(map_->file, &status) != 0) fail("Clips.check_unchanged", map_->path, "readable", errno);
  if (static_cast<std::size_t>(status.st_size) < map_->size) {
    throw Error("Clips.check_unchanged: file must be as long as it was, " + std::to_string(map_->size) + " bytes, got " +
                std::to_string(status.st_size) + ", in " + map_->path + ". Leave it alone while it is read.");
  }
}

void Clips::prefetch(std::int64_t number) const noexcept {
  if (map_ == nullptr || number < 0 || number >= size()) return;
  static const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto frame_bytes = static_cast<std::size_t>(shape_.size()) * sizeof(float);
  const auto base = static_cast<std::size_t>(reinterpret_cast<const unsigned char*>(frames_) - map_->bytes);
  const auto index = static_cast<std::size_t>(number);
  const std::size_t begin = (base + static_cast<std::size_t>(offsets_[index]) * frame_bytes) / page * page;
  const std::size_t end = base + static_cast<std::size_t>(offsets_[index + 1]) * frame_bytes;
  ::madvise(const_cast<unsigned char*>(map_->bytes) + begin, end - begin, MADV_WILLNEED);
}

}  // namespace fastskel
