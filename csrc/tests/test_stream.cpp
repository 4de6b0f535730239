// The ring: what it gives is in order and complete under every number of threads, delays, kept batches, stops and errors.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "core/stream.h"

namespace fastskel_tests {

namespace {

using fastskel::Batch;
using fastskel::BatchStream;

constexpr std::chrono::milliseconds kLong = std::chrono::hours(1);
constexpr std::int64_t kClips = 100;

// what a row source may be told to do, and what is seen of it; outlives the stream. Read by threads that may still be
// at a batch which was dropped
struct Script {
  std::atomic<std::int64_t> failing_clip{-1}, broken_clip{-1};
  std::atomic<std::chrono::microseconds> delay{std::chrono::microseconds(0)};
  std::atomic<bool> file_cut{false};
  std::atomic<long> rows_made{0}, checks{0};
};

// two views of a row: seven numbers, and one; values tell clip, epoch and view
class Rows final : public fastskel::RowSource {
 public:
  explicit Rows(Script& script) : script_(script) {}
  std::vector<RowSize> row_sizes() const override { return {{7 * sizeof(std::int64_t), 3}, {sizeof(std::int64_t), 1}}; }
  void check() const override {
    ++script_.checks;
    if (script_.file_cut) throw fastskel::Error("file was cut");
  }
  void prefetch(std::int64_t) const noexcept override {}
  void read_ahead(std::int64_t, fastskel::Scratch&) const override {}
  void make(std::int64_t clip, std::uint32_t epoch, std::size_t view, void* out, std::uint8_t* mask,
            fastskel::Scratch&) const override {
    const std::chrono::microseconds delay = script_.delay;
    if (delay.count() > 0) std::this_thread::sleep_for(delay * (clip % 3));
    if (clip == script_.failing_clip) throw fastskel::Error("clip is bad", clip);
    if (clip == script_.broken_clip) throw std::bad_alloc();
    const std::int64_t value = value_of(clip, epoch, view);
    const std::size_t num = view == 0 ? 7 : 1;
    for (std::size_t i = 0; i < num; ++i) std::memcpy(static_cast<char*>(out) + i * sizeof(value), &value, sizeof(value));
    std::memset(mask, static_cast<int>(clip % 2), view == 0 ? 3 : 1);
    ++script_.rows_made;
  }
  static std::int64_t value_of(std::int64_t clip, std::uint32_t epoch, std::size_t view) {
    return (static_cast<std::int64_t>(epoch) * kClips + clip) * 2 + static_cast<std::int64_t>(view);
  }

 private:
  Script& script_;
};

BatchStream make_stream(Script& script, std::int64_t batch_size, int threads, int depth) {
  return {std::make_unique<Rows>(script), batch_size, threads, depth};
}

std::vector<std::int64_t> order_of(std::uint32_t epoch, std::size_t num) {
  std::vector<std::int64_t> order(num);
  for (std::size_t i = 0; i < num; ++i) order[i] = static_cast<std::int64_t>((i * 37 + epoch) % kClips);
  return order;
}

bool holds(const Batch& batch, std::uint32_t epoch) {
  const unsigned char* memory = batch.slot->data();
  const std::size_t numbers[] = {7, 1}, masks[] = {3, 1};
  for (std::size_t view = 0; view < 2; ++view) {
    if (reinterpret_cast<std::uintptr_t>(memory + batch.places[view].clips) % 64 != 0) return false;
    if (reinterpret_cast<std::uintptr_t>(memory + batch.places[view].mask) % 64 != 0) return false;
    for (std::size_t row = 0; row < batch.clips.size(); ++row) {
      const std::int64_t clip = batch.clips[row];
      for (std::size_t i = 0; i < numbers[view]; ++i) {
        std::int64_t value = 0;
        std::memcpy(&value, memory + batch.places[view].clips + (row * numbers[view] + i) * sizeof(value), sizeof(value));
        if (value != Rows::value_of(clip, epoch, view)) return false;
      }
      for (std::size_t i = 0; i < masks[view]; ++i) {
        if (memory[batch.places[view].mask + row * masks[view] + i] != clip % 2) return false;
      }
    }
  }
  return true;
}

std::optional<Batch> next(BatchStream& stream) {
  std::optional<Batch> batch;
  check(stream.next(kLong, batch), "a batch comes in time");
  return batch;
}

// takes the batches of an epoch from `position` on and checks each; at most `most` of them
std::size_t take(BatchStream& stream, std::uint32_t epoch, const std::vector<std::int64_t>& order, std::size_t batch_size,
                 std::size_t position, std::size_t most, std::mt19937& random, std::deque<Batch>& kept) {
  std::size_t number = position;
  while (number - position < most) {
    std::optional<Batch> batch = next(stream);
    if (!batch) break;
    const std::size_t begin = number * batch_size, end = std::min(begin + batch_size, order.size());
    check(batch->clips == std::vector<std::int64_t>(order.data() + begin, order.data() + end), "clips of a batch");
    check(holds(*batch, epoch), "values of a batch");
    ++number;
    if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    if (random() % 3 == 0) kept.push_back(std::move(*batch));
    if (kept.size() > 6) kept.pop_front();
  }
  return number - position;
}

void gives_everything() {
  std::mt19937 random(1);
  for (const int threads : {0, 1, 2, 3, 8}) {
    for (int depth = 1; depth <= 4; ++depth) {
      for (const std::size_t batch_size : {std::size_t{1}, std::size_t{7}, std::size_t{32}}) {
        Script script;
        script.delay = std::chrono::microseconds(random() % 2 ? 30 : 0);
        BatchStream stream = make_stream(script, static_cast<std::int64_t>(batch_size), threads, depth);
        std::deque<Batch> kept;
        std::vector<std::uint32_t> epochs;
        for (std::uint32_t epoch = 0; epoch < 3; ++epoch) {
          const std::size_t num = epoch == 2 ? 5 : 70, batches = (num + batch_size - 1) / batch_size;
          const std::vector<std::int64_t> order = order_of(epoch, num);
          const std::size_t position = random() % (batches + 1);
          stream.start(epoch, order, static_cast<std::int64_t>(position));
          check(take(stream, epoch, order, batch_size, position, batches + 1, random, kept) == batches - position,
                "number of batches");
          check(!next(stream), "nothing after the last batch");
        }
        check(stream.statistics().slots_held <= depth + 2 + 7, "slots of a stream");
      }
    }
  }
}

void restarts() {
  std::mt19937 random(2);
  for (const int threads : {0, 1, 4}) {
    Script script;
    script.delay = std::chrono::microseconds(20);
    BatchStream stream = make_stream(script, 8, threads, 3);
    std::deque<Batch> kept;
    check(!next(stream), "nothing before the start");
    for (std::uint32_t epoch = 0; epoch < 40; ++epoch) {
      const std::vector<std::int64_t> order = order_of(epoch, 64);
      stream.start(epoch, order, 0);
      take(stream, epoch, order, 8, 0, random() % 5, random, kept);
      if (random() % 3 == 0) {
        stream.stop();
        check(!next(stream), "nothing after a stop");
      }
    }
    stream.close();
    check(!next(stream), "nothing after closing");
    check_error([&] { stream.start(0, {1}, 0); }, "stream must be open, got a closed one");
    stream.close();
    const auto held = static_cast<std::int64_t>(kept.size());
    check(stream.statistics().slots_held == held, "a closed stream holds only what others keep");
    // batches outlive their stream
    kept.clear();
    check(stream.statistics().slots_held == 0, "what others let go of is freed");
  }
}

void recycles() {
  Script script;
  BatchStream stream = make_stream(script, 4, 2, 2);
  for (std::uint32_t epoch = 0; epoch < 20; ++epoch) {
    stream.start(epoch, order_of(epoch, 80), 0);
    std::optional<Batch> last;
    // the last batch is held while the next one comes, as a loop over a loader does
    while (std::optional<Batch> batch = next(stream)) last = std::move(batch);
  }
  check(stream.statistics().slots_made <= 4, "slots are used again, made " + std::to_string(stream.statistics().slots_made));
  std::vector<Batch> all;
  stream.start(0, order_of(0, 80), 0);
  while (std::optional<Batch> batch = next(stream)) all.push_back(std::move(*batch));
  check(all.size() == 20, "every batch may be kept");
  for (const Batch& batch : all) check(holds(batch, 0), "kept batches keep their values");
  all.clear();
  check(stream.statistics().slots_held <= 4, "what is not needed is freed");
}

void batches_outlive_streams() {
  std::vector<Batch> kept;
  for (int round = 0; round < 5; ++round) {
    Script script;
    BatchStream stream = make_stream(script, 5, 3, 4);
    stream.start(1, order_of(1, 50), 0);
    kept.push_back(std::move(*next(stream)));
  }
  for (const Batch& batch : kept) check(holds(batch, 1), "a batch outlives its stream");
}

void reports_errors() {
  for (const int threads : {0, 1, 2, 8}) {
    for (const int depth : {1, 3}) {
      Script script;
      BatchStream stream = make_stream(script, 4, threads, depth);
      std::vector<std::int64_t> order = order_of(0, 40);
      // two bad clips in the batch: the first one is reported, whoever makes which, and whichever fails sooner
      script.delay = std::chrono::microseconds(300);
      const bool sooner = depth == 1;
      order[22] = script.failing_clip = sooner ? 199 : 200;
      order[23] = script.broken_clip = sooner ? 302 : 301;
      stream.start(0, order, 0);
      for (int i = 0; i < 5; ++i) check(next(stream).has_value(), "batches before the bad one come");
      std::optional<Batch> batch;
      try {
        stream.next(kLong, batch);
        check(false, "the bad batch throws");
      } catch (const fastskel::Error& error) {
        check(error.clip == order[22] && std::string(error.what()) == "clip is bad", "the error names its clip");
      }
      check(!next(stream), "nothing after an error");
      script.failing_clip = -1;
      stream.start(0, order, 5);
      bool out_of_memory = false;
      try {
        stream.next(kLong, batch);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
      check(out_of_memory, "any exception arrives");
      stream.start(1, order_of(1, 8), 0);
      check(holds(*next(stream), 1) && holds(*next(stream), 1) && !next(stream), "a stream works on after an error");
      script.file_cut = true;
      stream.start(1, order_of(1, 8), 0);
      check_error([&] { stream.next(kLong, batch); }, "file was cut");
    }
  }
  Script script;
  check_error([&] { make_stream(script, std::int64_t{1} << 60, 0, 1); }, "such that memory holds a batch");
}

// a file may be cut while a batch is made: it is looked at before and after
void checks_twice() {
  Script script;
  BatchStream stream = make_stream(script, 4, 0, 1);
  stream.start(0, order_of(0, 4), 0);
  next(stream);
  check(script.checks == 2 && script.rows_made == 8, "checked before and after");
}

void waits_no_longer_than_told() {
  Script script;
  script.delay = std::chrono::milliseconds(20);
  BatchStream stream = make_stream(script, 16, 1, 1);
  std::optional<Batch> batch;
  stream.start(0, order_of(0, 16), 0);
  check(!stream.next(std::chrono::milliseconds(1), batch) && !batch, "a wait ends");
  check(next(stream).has_value(), "nothing is lost when a wait ends");
  check(stream.statistics().seconds_waited > 0.001, "waiting is counted");
}

void consumers_share() {
  Script script;
  BatchStream stream = make_stream(script, 3, 2, 2);
  for (int round = 0; round < 10; ++round) {
    stream.start(0, order_of(0, 90), 0);
    std::atomic<int> taken{0};
    std::vector<std::thread> consumers;
    for (int i = 0; i < 3; ++i) {
      consumers.emplace_back([&] {
        while (std::optional<Batch> batch = next(stream)) {
          check(holds(*batch, 0), "a batch of one of several consumers");
          ++taken;
        }
      });
    }
    for (std::thread& consumer : consumers) consumer.join();
    check(taken == 30, "consumers together have every batch once");
  }
  // a consumer that waits is told when another thread stops the stream
  script.delay = std::chrono::milliseconds(50);
  stream.start(0, order_of(0, 90), 0);
  std::thread consumer([&] {
    while (next(stream)) {
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  stream.stop();
  consumer.join();
}

void refuses_children() {
  Script script;
  script.delay = std::chrono::microseconds(500);
  auto stream = std::make_unique<BatchStream>(std::make_unique<Rows>(script), 4, 3, 2);
  stream->start(0, order_of(0, 90), 0);
  std::optional<Batch> batch = next(*stream);
  const ::pid_t child = ::fork();
  if (child == 0) {
    int wrong = 0;
    try {
      std::optional<Batch> other;
      stream->next(kLong, other);
      wrong = 1;
    } catch (const fastskel::Error& error) {
      wrong = std::string(error.what()).find("before the process forked") == std::string::npos ? 2 : 0;
    }
    if (!holds(*batch, 0)) wrong = 3;
    batch.reset();
    stream.reset();
    ::_exit(wrong);
  }
  int status = -1;
  check(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
        "a child is told, and ends: " + std::to_string(status));
  check(next(*stream).has_value(), "the parent goes on");
}

}  // namespace

void test_stream() {
  gives_everything();
  restarts();
  recycles();
  batches_outlive_streams();
  reports_errors();
  checks_twice();
  waits_no_longer_than_told();
  consumers_share();
  refuses_children();
}

}  // namespace fastskel_tests
