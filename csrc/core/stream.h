// Batches made ahead of their use by threads of its own, in order, with bits that do not depend on the threads.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/slots.h"
#include "core/view.h"

namespace fastskel {

// What a stream makes batches of. Every row is a function of its clip and the epoch; several threads call at once.
class RowSource {
 public:
  struct RowSize {
    std::size_t clip_bytes, mask_bytes;
  };
  virtual ~RowSource() = default;
  // of each view
  virtual std::vector<RowSize> row_sizes() const = 0;
  // throws if what rows are made of is no longer there
  virtual void check() const = 0;
  // says that a clip will be read soon
  virtual void prefetch(std::int64_t clip) const noexcept = 0;
  // says that a clip is the next that `scratch` will be used for
  virtual void read_ahead(std::int64_t clip, Scratch& scratch) const = 0;
  virtual void make(std::int64_t clip, std::uint32_t epoch, std::size_t view, void* out, std::uint8_t* mask,
                    Scratch& scratch) const = 0;
};

// views of packed clips
class ViewRows final : public RowSource {
 public:
  // the clips outlive the object
  ViewRows(const Clips& clips, std::vector<ViewMaker> makers, DType dtype);
  std::vector<RowSize> row_sizes() const override;
  void check() const override;
  void prefetch(std::int64_t clip) const noexcept override;
  void read_ahead(std::int64_t clip, Scratch& scratch) const override;
  void make(std::int64_t clip, std::uint32_t epoch, std::size_t view, void* out, std::uint8_t* mask,
            Scratch& scratch) const override;

 private:
  const Clips* clips_;
  std::vector<ViewMaker> makers_;
  DType dtype_;
};

struct Batch {
  // rows of clips and of masks, one behind the other, begin at these bytes of the slot, view after view
  struct Place {
    std::size_t clips, mask;
  };
  std::shared_ptr<Slot> slot;
  std::vector<Place> places;
  std::vector<std::int64_t> clips;  // number of each row's clip
};

class BatchStream {
 public:
  struct Statistics {
    std::int64_t slots_made, slots_held;  // ever, and with memory now
    std::size_t slot_bytes;
    double seconds_waited;  // in next()
  };

  // `num_threads` 0: next() makes the batch. `depth` batches at most are made ahead. `keep`: slots that return are never freed
  // before close(). Error if a slot has no size
  BatchStream(std::unique_ptr<const RowSource> source, std::int64_t batch_size, int num_threads, int depth,
              bool keep = false);
  // as close(); in a child process nothing is touched, and what the stream held is left to the system
  ~BatchStream();
  BatchStream(const BatchStream&) = delete;
  BatchStream& operator=(const BatchStream&) = delete;

  // from now on the batches of an order of clips, from batch number `position`; what was in the making is dropped
  void start(std::uint32_t epoch, std::vector<std::int64_t> order, std::int64_t position);
  // false if no batch was complete in time; else `batch` is the next one, or empty after the last. What was thrown in
  // making a batch is thrown in its turn, and ends the epoch
  bool next(std::chrono::milliseconds limit, std::optional<Batch>& batch);
  // drops what is in the making; next() then gives nothing
  void stop();
  // stops, joins the threads and frees what nobody holds; only batches that were handed out remain usable
  void close();

  Statistics statistics() const;

 private:
  struct Core;
  void check_process() const;
  std::unique_ptr<Core> core_;
};

}  // namespace fastskel
