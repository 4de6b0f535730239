// Views of clips through the ring: the same bytes from several threads as from one, which the sanitizers watch.
#include <cfenv>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/stream.h"

namespace fastskel_tests {

namespace {

using fastskel::BatchStream;
using fastskel::Clips;
using fastskel::DType;
using fastskel::Normalise;
using fastskel::Transform;
using fastskel::ViewProgram;

constexpr std::int64_t kBodies = 2, kJoints = 5, kChannels = 3, kBatch = 4;

struct Data {
  std::vector<float> frames;
  std::vector<std::int64_t> offsets{0};
};

// clips of 1 to 60 frames; in some the second body or a joint is absent
Data make_data() {
  Data data;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const std::int64_t length : {1, 2, 60, 7, 33, 16, 5, 48, 3, 20}) {
    const bool alone = random() % 2 == 0;
    for (std::int64_t i = 0; i < length * kBodies * kJoints * kChannels; ++i) {
      const std::int64_t body = i / (kJoints * kChannels) % kBodies;
      data.frames.push_back((alone && body == 1) || random() % 50 == 0 ? 0.0f : normal(random));
    }
    data.offsets.push_back(data.offsets.back() + length);
  }
  return data;
}

Transform transform(Transform::Kind kind) {
  Transform made;
  made.kind = kind;
  made.probability = 0.7f;
  made.count = kind == Transform::Kind::kBlur ? 5 : 2;
  made.low = 0.5f;
  made.high = 1.5f;
  made.angles[0] = made.angles[1] = made.angles[2] = 0.3f;
  made.flag = true;
  made.joints = {0, 2, 1, 4, 3};
  if (kind == Transform::Kind::kOneOf) {
    made.options = {transform(Transform::Kind::kCorruption), transform(Transform::Kind::kShear)};
  }
  return made;
}

std::vector<ViewProgram> make_programs(std::int64_t num_clips) {
  using Kind = Transform::Kind;
  std::vector<ViewProgram> programs(3);
  for (ViewProgram& program : programs) {
    program.frames = 16;
    program.random_crop = true;
    program.low = 1 << 21;
    program.high = 1 << 24;
    program.parents = {0, 0, 1, 2, 3};
  }
  for (const Kind kind : {Kind::kCorruption, Kind::kShear, Kind::kRotation, Kind::kScaling, Kind::kJointMask, Kind::kOneOf,
                          Kind::kMirror, Kind::kNoise, Kind::kBlur, Kind::kFrameMask, Kind::kBodyMask}) {
    programs[0].transforms.push_back(transform(kind));
  }
  programs[1].normalise = Normalise::kCenter;
  programs[1].stream = fastskel::Stream::kBone;
  programs[2].normalise = Normalise::kAlign;
  programs[2].stream = fastskel::Stream::kMotion;
  for (std::int64_t clip = 0; clip < num_clips; ++clip) {
    const double origin = clip % 3 == 0 ? std::nan("") : 0.25;
    const double rows[12] = {origin, 0, 0, 0, 1, 0, -1, 0, 0, 0, 0, 1};
    programs[2].alignment.insert(programs[2].alignment.end(), rows, rows + 12);
  }
  return programs;
}

std::unique_ptr<const fastskel::RowSource> make_rows(const Clips& clips, DType dtype) {
  std::vector<fastskel::ViewMaker> makers;
  for (ViewProgram& program : make_programs(clips.size())) {
    makers.emplace_back(clips, std::move(program), 11, static_cast<std::uint32_t>(makers.size()));
  }
  return std::make_unique<fastskel::ViewRows>(clips, std::move(makers), dtype);
}

// bytes of all batches of three epochs
std::string run(const Clips& clips, DType dtype, int threads) {
  auto rows = make_rows(clips, dtype);
  const std::vector<fastskel::RowSource::RowSize> sizes = rows->row_sizes();
  BatchStream stream(std::move(rows), kBatch, threads, 2);
  std::string bytes;
  for (std::uint32_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<std::int64_t> order;
    for (std::int64_t i = 0; i < clips.size(); ++i) order.push_back((3 * i + epoch) % clips.size());
    stream.start(epoch, order, 0);
    for (std::optional<fastskel::Batch> batch; stream.next(std::chrono::hours(1), batch) && batch;) {
      const auto* memory = reinterpret_cast<const char*>(batch->slot->data());
      for (std::size_t view = 0; view < sizes.size(); ++view) {
        bytes.append(memory + batch->places[view].clips, sizes[view].clip_bytes * batch->clips.size());
        bytes.append(memory + batch->places[view].mask, sizes[view].mask_bytes * batch->clips.size());
      }
    }
  }
  return bytes;
}

}  // namespace

void test_views() {
  const Data data = make_data();
  const fastskel::FrameShape shape{kBodies, kJoints, kChannels};
  const Clips clips = Clips::borrow(data.frames.data(), data.offsets.back(), shape, data.offsets);
  const Folder folder;
  write(folder / "frames.npy", npy("<f4", "(" + std::to_string(data.offsets.back()) + ", 2, 5, 3)",
                                   bytes_of(data.frames.data(), data.frames.size())));
  write(folder / "offsets.npy", npy("<i8", "(" + std::to_string(data.offsets.size()) + ",)",
                                    bytes_of(data.offsets.data(), data.offsets.size())));
  const Clips mapped = Clips::open(folder / "frames.npy", folder / "offsets.npy");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const std::string alone = run(clips, dtype, 0);
    check(alone.size() == 3 * 10 * 3 * (16 * kBodies * (kJoints * kChannels * fastskel::size_of(dtype) + 1)), "size of views");
    check(run(mapped, dtype, 0) == alone, "a mapped file gives the same views");
    for (const int threads : {1, 4}) check(run(clips, dtype, threads) == alone, "several threads give the same views");
    // a caller's rounding is not that of its views, nor of the threads that it starts
    std::fesetround(FE_UPWARD);
    for (const int threads : {0, 2}) check(run(clips, dtype, threads) == alone, "rounding of a caller changes no view");
    check(std::fegetround() == FE_UPWARD, "a caller's rounding stays his own");
    std::fesetround(FE_TONEAREST);
  }
}

}  // namespace fastskel_tests
