// Clips, orders and streams of batches for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "core/cpu_count.h"
#include "core/sampler.h"
#include "core/stream.h"

namespace py = pybind11;

namespace fastskel {

namespace {

constexpr std::int64_t kWordLimit = std::int64_t{1} << 32;
// far more than helps; above it a mistyped number would ask the system for too much
constexpr int kMostThreads = 1024;
// how long Ctrl-C may wait
constexpr std::chrono::milliseconds kSignalInterval{50};

void require_between(std::int64_t value, std::int64_t least, std::int64_t most, const char* function, const char* argument,
                     const char* remedy) {
  require(value >= least && value <= most, function, argument,
          "in " + std::to_string(least) + " .. " + std::to_string(most), std::to_string(value), remedy);
}

std::string describe(const py::array& array) {
  return py::str(array.dtype()).cast<std::string>() + " " +
         py::str(py::object(array.attr("shape"))).cast<std::string>();
}

// the values of a contiguous array of one type, never converted
template <typename T>
const T* values(const py::array& array, py::ssize_t num_axes, const char* function, const char* argument,
                const char* contract) {
  const bool fits =
      array.ndim() == num_axes && py::isinstance<py::array_t<T>>(array) && (array.flags() & py::array::c_style);
  require(fits, function, argument, contract, describe(array), "Convert it with numpy.ascontiguousarray");
  return static_cast<const T*>(array.data());
}

py::array_t<std::int64_t> to_array(const std::vector<std::int64_t>& numbers) {
  return py::array_t<std::int64_t>(static_cast<py::ssize_t>(numbers.size()), numbers.data());
}

py::array_t<std::int64_t> epoch_order(std::uint64_t seed, std::int64_t epoch, std::int64_t n, bool shuffle,
                                      const std::optional<py::array>& weights, std::int64_t num_draws,
                                      std::int64_t rank, std::int64_t world_size,
                                      const std::optional<std::int64_t>& num_samples) {
  const char* function = "epoch_order";
  require_between(epoch, 0, kWordLimit - 1, function, "epoch", "Count epochs from 0");
  require_between(n, 1, kWordLimit - 1, function, "n", "Give at least one clip");
  require_between(num_draws, 0, kWordLimit - 1, function, "num_draws", "Draw fewer");
  require_between(world_size, 1, kWordLimit - 1, function, "world_size", "Check the launcher");
  require_between(rank, 0, world_size - 1, function, "rank", "Check the launcher");
  const std::uint64_t* weight = nullptr;
  if (weights) {
    weight = values<std::uint64_t>(*weights, 1, function, "weights", "contiguous uint64 (n,)");
    require(weights->shape(0) == n, function, "weights", "one for each of " + std::to_string(n) + " positions",
            std::to_string(weights->shape(0)), "Weigh every position");
    require(shuffle, function, "shuffle", "true where there are weights", "false", "Draws have no order of their own");
  } else {
    require(num_draws == 0, function, "num_draws", "0 without weights", std::to_string(num_draws), "Give weights");
  }
  const std::int64_t length = num_draws > 0 ? num_draws : n;
  const std::int64_t most = (length + world_size - 1) / world_size, share = num_samples.value_or(most);
  require_between(share, 0, most, function, "num_samples", "A rank has no more");

  std::vector<std::int64_t> order;
  without_gil([&] {
    const auto step = static_cast<std::uint32_t>(epoch);
    if (weight != nullptr) {
      order = weighted_order(seed, step, weight, n, length);
    } else if (shuffle) {
      order = permutation(seed, step, n);
    } else {
      order.resize(static_cast<std::size_t>(n));
      for (std::int64_t i = 0; i < n; ++i) order[static_cast<std::size_t>(i)] = i;
    }
    if (world_size > 1 || share != length) order = rank_share(order, rank, world_size, share);
  });
  return to_array(order);
}

Clips open_clips(const std::filesystem::path& frames, const std::filesystem::path& offsets) {
  return Clips::open(frames.string(), offsets.string());
}

Clips borrow_clips(const py::array& frames, const py::array& offsets) {
  const char* function = "Clips.borrow";
  const auto* first = values<float>(frames, 4, function, "frames", "contiguous float32 (sum T, M, V, C)");
  const auto* bounds = values<std::int64_t>(offsets, 1, function, "offsets", "contiguous int64 (n + 1,)");
  require(frames.size() > 0, function, "frames", "at least one value", describe(frames), "Give clips");
  return Clips::borrow(first, frames.shape(0), {frames.shape(1), frames.shape(2), frames.shape(3)},
                       std::vector<std::int64_t>(bounds, bounds + offsets.shape(0)));
}

class PyBatchStream {
 public:
  // `views` is kept alive by the object that holds this one
  PyBatchStream(const ViewMakers& views, std::int64_t batch_size, int num_threads, int depth, bool keep) : views_(&views) {
    const char* function = "BatchStream";
    require_between(batch_size, 1, std::int64_t{1} << 31, function, "batch_size", "Choose a size");
    require_between(num_threads, 0, kMostThreads, function, "num_threads", "Use 0 to make batches inline");
    require_between(depth, 1, kMostThreads, function, "depth", "Make at least one batch ahead");
    stream_ = std::make_unique<BatchStream>(std::make_unique<ViewRows>(views.clips(), views.makers(), views.type()),
                                            batch_size, num_threads, depth, keep);
  }

  void start(std::int64_t epoch, const py::array& order, std::int64_t position) {
    const char* function = "BatchStream.start";
    require_between(epoch, 0, kWordLimit - 1, function, "epoch", "Count epochs from 0");
    require_between(position, 0, std::int64_t{1} << 62, function, "position", "Count batches from 0");
    const auto* numbers = values<std::int64_t>(order, 1, function, "order", "contiguous int64 (n,)");
    std::vector<std::int64_t> clips(numbers, numbers + order.shape(0));
    const std::int64_t last = views_->clips().size() - 1;
    const auto outside = std::find_if(clips.begin(), clips.end(), [last](std::int64_t clip) { return clip < 0 || clip > last; });
    if (outside != clips.end()) require_between(*outside, 0, last, function, "order", "Give numbers of clips");
    without_gil([&] { stream_->start(static_cast<std::uint32_t>(epoch), std::move(clips), position); });
  }

  py::object next() {
    std::optional<Batch> batch;
    for (bool done = false; !done;) {
      without_gil([&] { done = stream_->next(kSignalInterval, batch); });
      if (!done && PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    if (!batch) return py::none();
    auto slot = std::make_unique<std::shared_ptr<Slot>>(batch->slot);
    const py::capsule lease(slot.get(), [](void* held) { delete static_cast<std::shared_ptr<Slot>*>(held); });
    static_cast<void>(slot.release());
    const auto rows = static_cast<py::ssize_t>(batch->clips.size());
    Views views;
    for (std::size_t i = 0; i < batch->places.size(); ++i) {
      const std::vector<py::ssize_t> shape = views_->shape(i, rows);
      unsigned char* memory = batch->slot->data();
      views.emplace_back(py::array(views_->array_type(), shape, {}, memory + batch->places[i].clips, lease),
                         py::array(py::dtype::of<bool>(), std::vector<py::ssize_t>(shape.begin(), shape.begin() + 3), {},
                                   memory + batch->places[i].mask, lease));
    }
    return py::make_tuple(views, to_array(batch->clips), batch->slot->number());
  }

  void stop() {
    without_gil([&] { stream_->stop(); });
  }

  void close() {
    without_gil([&] { stream_->close(); });
  }

  BatchStream::Statistics statistics() const { return stream_->statistics(); }

 private:
  const ViewMakers* views_;
  std::unique_ptr<BatchStream> stream_;
};

// the class of errors that native code reports; lives as long as the process
PyObject* native_error = nullptr;

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const Error& error) {
    // names of files need not be UTF-8
    const auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
    const py::object instance = py::reinterpret_borrow<py::object>(native_error)(text);
    instance.attr("clip") = error.clip;
    PyErr_SetObject(native_error, instance.ptr());
  }
}

}  // namespace

void bind_stream(py::module_& module) {
  if (native_error == nullptr) {
    py::dict members;
    members["clip"] = -1;
    native_error = PyErr_NewExceptionWithDoc("fastskel._native.NativeError", "What went wrong in native code.",
                                             PyExc_RuntimeError, members.ptr());
    if (native_error == nullptr) throw py::error_already_set();
  }
  module.attr("NativeError") = py::reinterpret_borrow<py::object>(native_error);
  py::register_local_exception_translator(&translate);

  module.def("available_cpus", &available_cpus);
  module.def("epoch_order", &epoch_order, py::arg("seed"), py::arg("epoch"), py::arg("n"), py::kw_only(),
             py::arg("shuffle"), py::arg("weights") = py::none(), py::arg("num_draws") = 0, py::arg("rank") = 0,
             py::arg("world_size") = 1, py::arg("num_samples") = py::none());

  py::class_<Clips>(module, "Clips")
      .def_static("open", &open_clips, py::arg("frames"), py::arg("offsets"))
      .def_static("borrow", &borrow_clips, py::arg("frames").noconvert(), py::arg("offsets").noconvert(),
                  py::keep_alive<0, 1>())
      .def("__len__", &Clips::size)
      .def("check_unchanged", &Clips::check_unchanged);

  py::class_<PyBatchStream>(module, "BatchStream")
      .def(py::init<const ViewMakers&, std::int64_t, int, int, bool>(), py::arg("views"), py::kw_only(), py::arg("batch_size"),
           py::arg("num_threads"), py::arg("depth"), py::arg("keep") = false, py::keep_alive<1, 2>())
      .def("start", &PyBatchStream::start, py::arg("epoch"), py::arg("order").noconvert(), py::arg("position"))
      .def("next", &PyBatchStream::next)
      .def("stop", &PyBatchStream::stop)
      .def("close", &PyBatchStream::close)
      .def_property_readonly("slots_allocated", [](const PyBatchStream& self) { return self.statistics().slots_made; })
      .def_property_readonly("slots_held", [](const PyBatchStream& self) { return self.statistics().slots_held; })
      .def_property_readonly("slot_bytes", [](const PyBatchStream& self) { return self.statistics().slot_bytes; })
      .def_property_readonly("seconds_waited", [](const PyBatchStream& self) { return self.statistics().seconds_waited; });
}

}  // namespace fastskel
