#include "core/slots.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>
#include <utility>

namespace fastskel {

namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

Slot::Slot(std::size_t bytes, std::int64_t number) : data_(nullptr), number_(number) {
  // huge pages make the first touch of fresh memory several times cheaper; small slots would waste most of one
  const bool huge = bytes >= 2 * kHugePage;
  void* memory = nullptr;
  if (::posix_memalign(&memory, huge ? kHugePage : kCacheLine, bytes) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  // whole pages only: the rest of the last one may be another's. Refused where the system has none; nothing is lost then
  if (huge) ::madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  data_ = static_cast<unsigned char*>(memory);
}

Slot::~Slot() { std::free(data_); }

SlotPool::SlotPool(std::size_t bytes, std::size_t most_free)
    : bytes_(bytes), process_(::getpid()), most_free_(most_free) {}

std::shared_ptr<Slot> SlotPool::take() {
  std::unique_ptr<Slot> slot;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      // the one that returned last: it is the most likely to be in a cache
      slot = std::move(free_.back());
      free_.pop_back();
    } else {
      // room for its return now, when nothing may fail
      free_.reserve(static_cast<std::size_t>(num_held_) + 1);
      slot = std::make_unique<Slot>(bytes_, num_made_);
      ++num_made_;
      ++num_held_;
    }
  }
  // a shared pointer that cannot be made calls this too, so the slot returns in any case
  return {slot.release(), [pool = shared_from_this()](Slot* held) { pool->give_back(std::unique_ptr<Slot>(held)); }};
}

void SlotPool::give_back(std::unique_ptr<Slot> slot) noexcept {
  // in a child the mutex may be held by a thread that only its parent has
  if (::getpid() != process_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.size() < most_free_) {
    free_.push_back(std::move(slot));
  } else {
    --num_held_;
  }
}

void SlotPool::close() noexcept {
  std::vector<std::unique_ptr<Slot>> unused;
  const std::lock_guard<std::mutex> lock(mutex_);
  most_free_ = 0;
  num_held_ -= static_cast<std::int64_t>(free_.size());
  unused.swap(free_);
}

std::int64_t SlotPool::num_made() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_made_;
}

std::int64_t SlotPool::num_held() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_held_;
}

}  // namespace fastskel
