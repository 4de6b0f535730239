// The reader: good files, each kind of bad one, and files that change under it.
#include <unistd.h>

#include <numeric>
#include <vector>

#include "check.h"
#include "core/clips.h"
#include "core/npy.h"

namespace fastskel_tests {

namespace {

using fastskel::Clips;

const std::vector<std::int64_t> kOffsets = {0, 1, 4, 6};

std::vector<float> values() {
  std::vector<float> numbers(6 * 2 * 3 * 2);
  std::iota(numbers.begin(), numbers.end(), 1.0f);
  return numbers;
}

std::string frames_file(char version = 1) {
  const std::vector<float> numbers = values();
  return npy("<f4", "(6, 2, 3, 2)", bytes_of(numbers.data(), numbers.size()), version);
}

std::string offsets_file(const std::vector<std::int64_t>& offsets) {
  return npy("<i8", "(" + std::to_string(offsets.size()) + ",)", bytes_of(offsets.data(), offsets.size()));
}

void parse(const std::string& bytes) {
  fastskel::parse_frames(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), "frames.npy");
}

void refuses_frames() {
  const std::string good = frames_file();
  const auto with = [](const std::string& header) {
    std::string bytes = npy("<f4", "(1, 1, 1, 1)", std::string(4, '\0'));
    // same length, so that only the text is wrong
    return bytes.substr(0, 10) + header + std::string(bytes.size() - 15 - header.size(), ' ') + "\n" + std::string(4, '\0');
  };
  parse(with("{\"shape\":(1,1,1,1),\"fortran_order\":False,\"descr\":\"<f4\"}"));
  check_error([&] { parse(""); }, "got another kind of file, in frames.npy");
  check_error([&] { parse("\x93NUMPX" + good.substr(6)); }, "got another kind of file");
  check_error([&] { parse(good.substr(0, 6) + '\3' + good.substr(7)); }, "got version 3.0");
  check_error([&] { parse(good.substr(0, 60)); }, "got a file that ends in its header");
  check_error([&] { parse(npy("<f8", "(6, 2, 3, 2)", std::string(576, '\0'))); }, "got values of type <f8");
  check_error([&] { parse(npy(">f4", "(6, 2, 3, 2)", std::string(288, '\0'))); }, "got values of type >f4");
  check_error([&] { parse(npy("<f4", "(6, 2, 6)", std::string(288, '\0'))); }, "got another shape");
  check_error([&] { parse(npy("<f4", "(6, 2, 3, 2, 1)", std::string(288, '\0'))); }, "got another shape");
  check_error([&] { parse(npy("<f4", "(-6, 2, 3, 2)", std::string(288, '\0'))); }, "got another shape");
  check_error([&] { parse(npy("<f4", "(0, 2, 3, 2)", "")); }, "at least 1 along every axis, got 0");
  check_error([&] { parse(npy("<f4", "(4611686018427387904, 4, 1, 1)", "")); }, "a shape that no memory holds");
  check_error([&] { parse(npy("<f4", "(9223372036854775808, 1, 1, 1)", "")); }, "got another shape");
  check_error([&] { parse(good.substr(0, good.size() - 1)); }, "288 bytes of values, as its shape (6, 2, 3, 2) says, got 287");
  check_error([&] { parse(good + "x"); }, "got 289");
  check_error([&] { parse(with("{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1, 1, 1)}")); }, "got Fortran order");
  check_error([&] { parse(with("{'descr': '<f4', 'fortran_order': False}")); }, "without type, order or shape");
  check_error([&] { parse(with("{'descr': '<f4', 'descr': '<f4'}")); }, "a header with the key 'descr'");
  check_error([&] { parse(with("{'shape': (1, 1, 1, 1) 'descr': '<f4'}")); }, "a header that is no dictionary");
  check_error([&] { parse(with("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1)} 1")); },
              "more than a dictionary");
  std::string odd = good;
  odd.insert(odd.begin() + 20, ' ');
  odd[8] = static_cast<char>(odd[8] + 1);
  check_error([&] { parse(odd); }, "got values that begin at byte 129");
}

void refuses_offsets() {
  const auto open = [](const std::vector<std::int64_t>& offsets) {
    return [offsets] { fastskel::check_offsets(offsets, 6, "offsets.npy"); };
  };
  open({0, 6})();
  check_error(open({}), "at least one clip, got 0, in offsets.npy");
  check_error(open({0}), "at least one clip, got 1");
  check_error(open({1, 6}), "from 0 on, got 1");
  check_error(open({0, 2, 2, 6}), "strictly increasing, got 2 after 2 at clip 1");
  check_error(open({0, 2, -1, 6}), "strictly increasing, got -1 after 2 at clip 1");
  check_error(open({0, 2, 5}), "up to the 6 frames there are, got 5");
  check_error(open({0, 2, 7}), "up to the 6 frames there are, got 7");
}

void reads_files() {
  const Folder folder;
  const std::string frames = folder / "frames.npy", offsets = folder / "offsets.npy";
  check_error([&] { Clips::open(frames, offsets); }, "file must be readable, got No such file or directory, in " + frames);
  for (const char version : {'\1', '\2'}) {
    write(frames, frames_file(version));
    write(offsets, offsets_file(kOffsets));
    const Clips clips = Clips::open(frames, offsets);
    check(clips.size() == 3 && clips.shape().size() == 12, "shape of opened clips");
    const fastskel::ClipSpan clip = clips.clip(1);
    check(clip.num_frames == 3 && clip.frames[0] == 13.0f && clip.frames[35] == 48.0f, "values of an opened clip");
    clips.prefetch(2);
    clips.prefetch(7);
    check_error([&] { clips.clip(3); }, "number must be in range(3), got 3");
    check_error([&] { clips.clip(-1); }, "got -1");
  }
  write(offsets, offsets_file({0, 7}));
  check_error([&] { Clips::open(frames, offsets); }, "up to the 6 frames there are, got 7, in " + offsets);
  write(offsets, "");
  check_error([&] { Clips::open(frames, offsets); }, "got another kind of file, in " + offsets);
  check_error([&] { Clips::open(frames, folder / "."); }, "file must be readable");
  check_error([&] { Clips::open(folder / ".", offsets); }, "file must be a regular file");
  write(frames, "");
  check_error([&] { Clips::open(frames, offsets); }, "got another kind of file, in " + frames);
}

void notices_changes() {
  const Folder folder;
  const std::string frames = folder / "frames.npy", offsets = folder / "offsets.npy";
  write(frames, frames_file());
  write(offsets, offsets_file(kOffsets));
  const Clips clips = Clips::open(frames, offsets);
  const Clips copy = clips;
  clips.check_unchanged();
  std::filesystem::resize_file(frames, 300);
  check_error([&] { copy.check_unchanged(); }, "as long as it was, 416 bytes, got 300, in " + frames);
  write(frames, frames_file());
  clips.check_unchanged();
  std::filesystem::remove(frames);
  clips.check_unchanged();
  check(clips.clip(2).frames[23] == 72.0f, "a deleted file is read");
}

void borrows() {
  const std::vector<float> numbers = values();
  const Clips clips = Clips::borrow(numbers.data(), 6, {2, 3, 2}, kOffsets);
  check(clips.clip(2).frames == numbers.data() + 48 && clips.clip(2).num_frames == 2, "a borrowed clip");
  clips.check_unchanged();
  clips.prefetch(0);
  check_error([&] { Clips::borrow(numbers.data(), 5, {2, 3, 2}, kOffsets); }, "up to the 5 frames there are, got 6");
}

}  // namespace

void test_clips() {
  refuses_frames();
  refuses_offsets();
  reads_files();
  notices_changes();
  borrows();
}

}  // namespace fastskel_tests
