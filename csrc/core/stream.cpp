#include "core/stream.h"

#include <pthread.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "core/float_mode.h"

namespace fastskel {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kAlignment = 64;
// pieces of a batch per thread: enough that nobody waits long for the last one
constexpr std::size_t kPiecesPerThread = 4;

// bytes of a slot with `rows` rows more behind what it has, up to the next alignment
std::size_t extended(std::size_t bytes, std::size_t rows, std::size_t row_bytes) {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max() / 4;
  if (bytes > kMost || (row_bytes != 0 && rows > kMost / row_bytes)) {
    throw Error("BatchStream: batch_size must be such that memory holds a batch, got " + std::to_string(rows) + ". Lower it.");
  }
  return bytes + (rows * row_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// a batch in the making
struct Job {
  std::uint32_t epoch = 0;
  Batch batch;
  // set when nobody wants the batch any more
  std::atomic<bool> dropped{false};
  // guarded by the core's mutex: rows handed to threads, pieces of them in work, and what went wrong first
  std::size_t rows_given = 0, pieces_open = 0, failed_row = std::numeric_limits<std::size_t>::max();
  std::exception_ptr error;

  bool complete() const noexcept { return rows_given == batch.clips.size() && pieces_open == 0; }
};

// what a thread inherits: no signal but those that its own faults raise
class BlockedSignals {
 public:
  BlockedSignals() {
    ::sigset_t blocked;
    ::sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) ::sigdelset(&blocked, fault);
    ::pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~BlockedSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  ::sigset_t before_;
};

void name_thread() {
#ifdef __APPLE__
  ::pthread_setname_np("fastskel-loader");
#elif defined(__linux__)
  ::pthread_setname_np(::pthread_self(), "fastskel-loader");
#endif
}

}  // namespace

ViewRows::ViewRows(const Clips& clips, std::vector<ViewMaker> makers, DType dtype)
    : clips_(&clips), makers_(std::move(makers)), dtype_(dtype) {}

std::vector<RowSource::RowSize> ViewRows::row_sizes() const {
  std::vector<RowSize> sizes;
  for (const ViewMaker& maker : makers_) {
    sizes.push_back({static_cast<std::size_t>(maker.size()) * size_of(dtype_), static_cast<std::size_t>(maker.mask_size())});
  }
  return sizes;
}

void ViewRows::check() const { clips_->check_unchanged(); }

void ViewRows::prefetch(std::int64_t clip) const noexcept { clips_->prefetch(clip); }

void ViewRows::read_ahead(std::int64_t clip, Scratch& scratch) const { scratch.read_ahead(clips_->clip(clip), clips_->shape()); }

void ViewRows::make(std::int64_t clip, std::uint32_t epoch, std::size_t view, void* out, std::uint8_t* mask,
                    Scratch& scratch) const {
  makers_[view].make(clip, epoch, dtype_, out, mask, scratch);
}

struct BatchStream::Core {
  Core(std::unique_ptr<const RowSource> from, std::int64_t size, int threads_wanted, int batches_ahead,
       bool keep)
      : source(std::move(from)),
        sizes(source->row_sizes()),
        batch_size(static_cast<std::size_t>(size)),
        num_threads(static_cast<std::size_t>(threads_wanted)),
        depth(static_cast<std::size_t>(batches_ahead)),
        piece_rows(std::max<std::size_t>(1, batch_size / (kPiecesPerThread * std::max<std::size_t>(num_threads, 1)))) {
    std::size_t bytes = 0;
    for (const RowSource::RowSize& row : sizes) {
      const std::size_t masks = extended(bytes, batch_size, row.clip_bytes);
      places.push_back({bytes, masks});
      bytes = extended(masks, batch_size, row.mask_bytes);
    }
    if (bytes == 0) throw Error("BatchStream: views must have values, got batches of no bytes. Give a view.");
    // besides those made ahead, a loop holds one batch until it has the next
    pool = std::make_shared<SlotPool>(bytes, keep ? std::numeric_limits<std::size_t>::max() : depth + 2);
  }

  // the mutex is held: the batch that comes next
  std::shared_ptr<Job> begin_job() {
    auto job = std::make_shared<Job>();
    const std::size_t begin = next_batch * batch_size, end = std::min(begin + batch_size, order.size());
    job->epoch = epoch;
    job->batch.clips.assign(order.data() + begin, order.data() + end);
    job->batch.places = places;
    job->batch.slot = pool->take();
    ++next_batch;
    return job;
  }

  bool more_batches() const noexcept { return !failure && next_batch < num_batches; }

  // the mutex is held: what is in the making is nobody's any more
  void drop_jobs() noexcept {
    for (const auto& job : jobs) job->dropped = true;
    jobs.clear();
    failure = nullptr;
    next_batch = num_batches = 0;
  }

  // rows of a batch with all their views; `row` says at which one an exception left
  void make_rows(Job& job, std::size_t& row, std::size_t end, std::optional<Scratch>& scratch) const {
    const DefaultFloats floats;
    if (!scratch) scratch.emplace();
    source->check();
    for (std::size_t i = row; i < end; ++i) source->prefetch(job.batch.clips[i]);
    unsigned char* memory = job.batch.slot->data();
    for (; row < end && !job.dropped; ++row) {
      if (row + 1 < end) source->read_ahead(job.batch.clips[row + 1], *scratch);
      for (std::size_t view = 0; view < sizes.size(); ++view) {
        source->make(job.batch.clips[row], job.epoch, view, memory + places[view].clips + row * sizes[view].clip_bytes,
                     memory + places[view].mask + row * sizes[view].mask_bytes, *scratch);
      }
    }
    // a file that lost its end while it was read shows zeros there
    source->check();
  }

  // the mutex is held: a batch with rows to give, begun if there is none and there may be one
  std::shared_ptr<Job> find_work() {
    for (const auto& job : jobs) {
      if (job->rows_given < job->batch.clips.size()) return job;
    }
    if (!more_batches() || jobs.size() >= depth) return nullptr;
    try {
      jobs.push_back(begin_job());
      return jobs.back();
    } catch (...) {
      failure = std::current_exception();
      ready.notify_all();
      return nullptr;
    }
  }

  void work_loop() {
    name_thread();
    std::optional<Scratch> scratch;
    std::unique_lock<std::mutex> lock(mutex);
    while (!closing) {
      std::shared_ptr<Job> job = find_work();
      if (job == nullptr) {
        work.wait(lock);
        continue;
      }
      std::size_t row = job->rows_given;
      const std::size_t end = std::min(row + piece_rows, job->batch.clips.size());
      job->rows_given = end;
      ++job->pieces_open;
      lock.unlock();
      std::exception_ptr error;
      try {
        make_rows(*job, row, end, scratch);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      --job->pieces_open;
      // earlier rows are all given, so the first row at fault is the same with any threads
      if (error && row < job->failed_row) {
        job->failed_row = row;
        job->error = error;
        job->rows_given = job->batch.clips.size();
      }
      if (job->complete()) ready.notify_all();
    }
  }

  void create_threads() {
    const BlockedSignals blocked;
    while (threads.size() < num_threads) threads.emplace_back(&Core::work_loop, this);
  }

  const ::pid_t process = ::getpid();
  const std::unique_ptr<const RowSource> source;
  const std::vector<RowSource::RowSize> sizes;
  const std::size_t batch_size, num_threads, depth, piece_rows;
  std::vector<Batch::Place> places;
  std::shared_ptr<SlotPool> pool;
  // serialises callers that change the threads, and those that make a batch themselves
  std::mutex caller;
  std::vector<std::thread> threads;
  std::optional<Scratch> caller_scratch;

  std::mutex mutex;
  std::condition_variable work, ready;
  // guarded by mutex
  std::vector<std::int64_t> order;
  std::uint32_t epoch = 0;
  std::size_t next_batch = 0, num_batches = 0;
  std::deque<std::shared_ptr<Job>> jobs;
  std::exception_ptr failure;
  bool closing = false;
  double seconds_waited = 0;
};

BatchStream::BatchStream(std::unique_ptr<const RowSource> source, std::int64_t batch_size, int num_threads, int depth,
                         bool keep)
    : core_(std::make_unique<Core>(std::move(source), batch_size, num_threads, depth, keep)) {}

BatchStream::~BatchStream() {
  if (::getpid() != core_->process) {
    // its mutexes may be locked and its threads do not exist here
    static_cast<void>(core_.release());
    return;
  }
  close();
}

void BatchStream::check_process() const {
  if (::getpid() == core_->process) return;
  throw Error("BatchStream: stream must be used in the process that made it, got one made before the process forked. "
              "Make a new loader in the child.");
}

void BatchStream::start(std::uint32_t epoch, std::vector<std::int64_t> order, std::int64_t position) {
  check_process();
  Core& core = *core_;
  const std::lock_guard<std::mutex> caller(core.caller);
  {
    const std::lock_guard<std::mutex> lock(core.mutex);
    if (core.closing) throw Error("BatchStream.start: stream must be open, got a closed one. Make a new loader.");
    core.drop_jobs();
    core.epoch = epoch;
    core.order = std::move(order);
    core.num_batches = (core.order.size() + core.batch_size - 1) / core.batch_size;
    core.next_batch = static_cast<std::size_t>(position);
  }
  try {
    core.create_threads();
  } catch (const std::system_error& error) {
    stop();
    throw Error("BatchStream.start: num_threads must be at most what the system allows, got " +
                std::to_string(core.num_threads) + " (" + error.what() + "). Lower it.");
  } catch (...) {
    // else next() might wait for threads that do not exist
    stop();
    throw;
  }
  core.work.notify_all();
}

bool BatchStream::next(std::chrono::milliseconds limit, std::optional<Batch>& batch) {
  check_process();
  Core& core = *core_;
  const Clock::time_point begin = Clock::now();
  batch.reset();
  std::shared_ptr<Job> job;
  std::exception_ptr error;
  if (core.num_threads == 0) {
    const std::lock_guard<std::mutex> caller(core.caller);
    std::unique_lock<std::mutex> lock(core.mutex);
    try {
      if (core.more_batches()) {
        job = core.begin_job();
        lock.unlock();
        std::size_t row = 0;
        core.make_rows(*job, row, job->batch.clips.size(), core.caller_scratch);
      }
    } catch (...) {
      error = std::current_exception();
    }
    if (!lock.owns_lock()) lock.lock();
    if (error) core.drop_jobs();
    core.seconds_waited += std::chrono::duration<double>(Clock::now() - begin).count();
  } else {
    std::unique_lock<std::mutex> lock(core.mutex);
    const bool in_time = core.ready.wait_for(lock, limit, [&] {
      return core.jobs.empty() ? !core.more_batches() : core.jobs.front()->complete();
    });
    core.seconds_waited += std::chrono::duration<double>(Clock::now() - begin).count();
    if (!in_time) return false;
    if (core.jobs.empty()) {
      error = core.failure;
    } else {
      job = std::move(core.jobs.front());
      core.jobs.pop_front();
      error = job->error;
    }
    if (error) core.drop_jobs();
  }
  // there may be room for another batch now, or nothing left that others wait for
  core.work.notify_all();
  core.ready.notify_all();
  if (error) std::rethrow_exception(error);
  if (job != nullptr) batch = std::move(job->batch);
  return true;
}

void BatchStream::stop() {
  check_process();
  const std::lock_guard<std::mutex> lock(core_->mutex);
  core_->drop_jobs();
  core_->ready.notify_all();
}

void BatchStream::close() {
  check_process();
  Core& core = *core_;
  const std::lock_guard<std::mutex> caller(core.caller);
  {
    const std::lock_guard<std::mutex> lock(core.mutex);
    core.drop_jobs();
    core.closing = true;
  }
  core.work.notify_all();
  core.ready.notify_all();
  for (std::thread& thread : core.threads) thread.join();
  core.threads.clear();
  core.pool->close();
}

BatchStream::Statistics BatchStream::statistics() const {
  check_process();
  const std::lock_guard<std::mutex> lock(core_->mutex);
  return {core_->pool->num_made(), core_->pool->num_held(), core_->pool->slot_bytes(), core_->seconds_waited};
}

}  // namespace fastskel
