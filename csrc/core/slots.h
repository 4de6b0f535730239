// Memory for batches, allocated when it is first needed and used again when its holder lets go.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace fastskel {

// memory for one batch, aligned to 64 bytes at least; its contents are whatever the last batch left
class Slot {
 public:
  // std::bad_alloc if there is no memory
  Slot(std::size_t bytes, std::int64_t number);
  ~Slot();
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  unsigned char* data() const noexcept { return data_; }
  // counts the slots of a pool from 0; never given to another slot
  std::int64_t number() const noexcept { return number_; }

 private:
  unsigned char* data_;
  std::int64_t number_;
};

class SlotPool : public std::enable_shared_from_this<SlotPool> {
 public:
  // keeps at most `most_free` slots for later
  SlotPool(std::size_t bytes, std::size_t most_free);

  // a free slot, or a new one. It returns to the pool with its last holder, which keeps the pool alive until then
  std::shared_ptr<Slot> take();
  // frees what is free, and from now on what returns
  void close() noexcept;

  std::size_t slot_bytes() const noexcept { return bytes_; }
  // slots made so far, also those that were freed again
  std::int64_t num_made() const;
  // slots that hold memory now, in use or free
  std::int64_t num_held() const;

 private:
  void give_back(std::unique_ptr<Slot> slot) noexcept;

  const std::size_t bytes_;
  const ::pid_t process_;
  mutable std::mutex mutex_;
  // guarded by mutex_
  std::size_t most_free_;
  std::vector<std::unique_ptr<Slot>> free_;
  std::int64_t num_made_ = 0, num_held_ = 0;
};

}  // namespace fastskel
