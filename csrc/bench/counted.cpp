// Fixed work of the loader for an instruction counter: `counted CASE FOLDER` prepares a case, calls fastskel_counted() once
// and prints how many units of work that were. Only what that function executes is counted: see fastskel.bench.guard.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/ntu_text.h"
#include "core/sampler.h"
#include "core/stream.h"
#include "core/view_rows.h"

namespace {

using fastskel::Clips;
using fastskel::DType;
using fastskel::FrameShape;
using fastskel::Transform;
using fastskel::ViewProgram;
using Kind = Transform::Kind;

constexpr FrameShape kShape{2, 25, 3};
constexpr std::int64_t kClips = 32, kBatch = 16, kFrames = 64, kViews = 4;
constexpr std::uint64_t kSeed = 11;

// what is counted; the name is what the counter is told to look for
std::function<void()> work;
extern "C" __attribute__((noinline)) void fastskel_counted() { work(); }

// numbers of its own, equal with every standard library: 24 bits of a linear congruence
struct Numbers {
  std::uint64_t state = 1;
  std::uint32_t next() noexcept {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state >> 40);
  }
};

void write(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

std::string npy(const std::string& descr, const std::string& shape, const void* values, std::size_t num_bytes) {
  std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }";
  header.append(64 - (10 + header.size() + 1) % 64, ' ');
  header += '\n';
  std::string bytes("\x93NUMPY\x01\x00", 8);
  bytes += static_cast<char>(header.size() & 0xFF);
  bytes += static_cast<char>(header.size() >> 8);
  return bytes + header + std::string(static_cast<const char*>(values), num_bytes);
}

// a packed data set of `num_clips` clips of 60 to 120 frames; every third has one body
void pack(const std::string& folder, std::int64_t num_clips) {
  Numbers numbers;
  std::vector<float> frames;
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t clip = 0; clip < num_clips; ++clip) {
    const std::int64_t length = 60 + numbers.next() % 61;
    for (std::int64_t i = 0; i < length * kShape.size(); ++i) {
      const bool absent = clip % 3 == 0 && i % kShape.size() >= kShape.size() / 2;
      frames.push_back(absent ? 0.0f : static_cast<float>(numbers.next()) * 0x1p-23f - 1.0f);
    }
    offsets.push_back(offsets.back() + length);
  }
  write(folder + "/frames.npy", npy("<f4", "(" + std::to_string(offsets.back()) + ", 2, 25, 3)", frames.data(),
                                    frames.size() * sizeof(float)));
  write(folder + "/offsets.npy", npy("<i8", "(" + std::to_string(offsets.size()) + ",)", offsets.data(),
                                     offsets.size() * sizeof(std::int64_t)));
}

// the published view: a random crop of 64 frames, then joint corruption or shear
ViewProgram usdrl() {
  Transform corruption, shear, one_of;
  corruption.kind = Kind::kCorruption;
  corruption.probability = 0.5f;
  corruption.count = 15;
  shear.kind = Kind::kShear;
  shear.high = 1.0f;
  one_of.kind = Kind::kOneOf;
  one_of.options = {corruption, shear};
  ViewProgram program;
  program.frames = kFrames;
  program.random_crop = true;
  program.low = (1 << 24) / 10;
  program.high = 1 << 24;
  program.min_frames = kFrames;
  program.transforms = {one_of};
  return program;
}

// every other kind of transform, and a clip centred first
ViewProgram pipeline() {
  ViewProgram program = usdrl();
  program.normalise = fastskel::Normalise::kCenter;
  program.transforms.clear();
  for (const Kind kind : {Kind::kRotation, Kind::kScaling, Kind::kJointMask, Kind::kMirror, Kind::kNoise, Kind::kBlur,
                          Kind::kFrameMask, Kind::kBodyMask}) {
    Transform made;
    made.kind = kind;
    made.count = kind == Kind::kBlur ? 7 : 5;
    made.low = 0.5f;
    made.high = 1.5f;
    made.angles[0] = made.angles[1] = made.angles[2] = 0.3f;
    for (std::int32_t joint = 0; joint < kShape.joints; ++joint) {
      made.joints.push_back(static_cast<std::int32_t>(kShape.joints) - 1 - joint);
    }
    program.transforms.push_back(made);
  }
  return program;
}

struct Job {
  std::int64_t units = 0;
  std::function<void()> call;
};

// samples of four views, in batches made by the calling thread
Job batches(const std::string& folder, const ViewProgram& program, DType dtype) {
  pack(folder, kClips);
  const auto clips = std::make_shared<Clips>(Clips::open(folder + "/frames.npy", folder + "/offsets.npy"));
  std::vector<fastskel::ViewMaker> makers;
  for (std::uint32_t view = 0; view < kViews; ++view) makers.emplace_back(*clips, program, kSeed, view);
  auto rows = std::make_unique<fastskel::ViewRows>(*clips, std::move(makers), dtype);
  const auto stream = std::make_shared<fastskel::BatchStream>(std::move(rows), kBatch, 0, 1);
  return {kClips, [clips, stream] {
            stream->start(0, fastskel::permutation(kSeed, 0, clips->size()), 0);
            std::int64_t made = 0;
            for (std::optional<fastskel::Batch> batch; stream->next(std::chrono::hours(1), batch) && batch;) {
              made += static_cast<std::int64_t>(batch->clips.size());
            }
            if (made != kClips) throw std::runtime_error("an epoch has " + std::to_string(made) + " samples");
          }};
}

// clips of a data set that is opened
Job opening(const std::string& folder) {
  pack(folder, kClips);
  return {kClips, [folder] {
            const Clips clips = Clips::open(folder + "/frames.npy", folder + "/offsets.npy");
            if (clips.size() != kClips) throw std::runtime_error("clips are missing");
          }};
}

// positions of a shuffled epoch
Job shuffling() {
  constexpr std::int64_t kPositions = 20'000;
  return {kPositions, [] {
            if (fastskel::permutation(kSeed, 1, kPositions).size() != kPositions) throw std::runtime_error("too few");
          }};
}

// bytes of a recording of two bodies as text
Job parsing() {
  Numbers numbers;
  std::string text = "12\n";
  char word[64];
  const auto add = [&](const char* format, double value) {
    text.append(word, static_cast<std::size_t>(std::snprintf(word, sizeof word, format, value)));
  };
  for (int frame = 0; frame < 12; ++frame) {
    text += "2\n";
    for (int body = 0; body < 2; ++body) {
      text += "7205759403793" + std::to_string(1000 + body) + " 0 1 1 1 1 0 -0.0253 0.0712 2\n25\n";
      for (int joint = 0; joint < 25; ++joint) {
        for (int value = 0; value < 11; ++value) add("%.7g ", static_cast<double>(numbers.next()) * 0x1p-22 - 2.0);
        text += "2\n";
      }
    }
  }
  const auto size = static_cast<std::int64_t>(text.size());
  return {size, [text] {
            if (fastskel::parse_ntu(text.data(), text.size(), 25, false).ids.size() != 24) throw std::runtime_error("bodies");
          }};
}

Job job(const std::string& name, const std::string& folder) {
  if (name == "views") return batches(folder, usdrl(), DType::kFloat32);
  if (name == "views-bfloat16") return batches(folder, usdrl(), DType::kBFloat16);
  if (name == "pipeline") return batches(folder, pipeline(), DType::kFloat32);
  if (name == "open") return opening(folder);
  if (name == "shuffle") return shuffling();
  if (name == "ntu-text") return parsing();
  throw std::runtime_error("no case " + name);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: counted CASE FOLDER\n", stderr);
    return 2;
  }
  try {
    // the same instructions on every processor of an architecture
    fastskel::select_instructions("baseline");
    const Job made = job(argv[1], argv[2]);
    work = made.call;
    fastskel_counted();
    std::printf("%lld\n", static_cast<long long>(made.units));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "counted: %s\n", error.what());
    return 1;
  }
  return 0;
}
