// The files csrc/bindings* alone know Python: they check arguments, allocate results, release the GIL and call csrc/core.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/crop_resize.h"
#include "core/float_mode.h"
#include "core/philox.h"

namespace py = pybind11;
using fastskel::require;

namespace {

constexpr std::int64_t kWordLimit = std::int64_t{1} << 32;
constexpr std::int64_t kHalfLimit = std::int64_t{1} << 16;
// keeps (2 i + 1) * length of the resize far from overflow
constexpr std::int64_t kFrameLimit = std::int64_t{1} << 30;

std::string describe(const py::array& array) {
  std::string shape;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) shape += (i ? ", " : "") + std::to_string(array.shape(i));
  if (array.ndim() == 1) shape += ",";
  return py::str(array.dtype()).cast<std::string>() + " (" + shape + ")";
}

template <typename T>
bool is_contiguous(const py::array& array, py::ssize_t ndim) {
  return array.ndim() == ndim && py::isinstance<py::array_t<T>>(array) && (array.flags() & py::array::c_style);
}

py::array_t<std::uint32_t> philox_words(std::uint64_t seed, const py::array& index, std::int64_t step,
                                        const py::array& view, std::int64_t use, std::int64_t num) {
  const char* function = "philox_words";
  require(is_contiguous<std::uint32_t>(index, 1), function, "index", "contiguous uint32 (N,)", describe(index),
          "Convert it with numpy.ascontiguousarray");
  require(is_contiguous<std::uint32_t>(view, 1) && view.shape(0) == index.shape(0), function, "view",
          "contiguous uint32 of index's shape", describe(view), "Give one view number per sample");
  require(step >= 0 && step < kWordLimit, function, "step", "in [0, 2**32)", std::to_string(step),
          "Count steps from 0");
  require(use >= 0 && use < kHalfLimit, function, "use", "in [0, 2**16)", std::to_string(use), "Choose a member of Use");
  require(num >= 0 && num < kWordLimit, function, "num", "in [0, 2**32)", std::to_string(num), "Draw fewer words");
  const py::ssize_t size = index.shape(0);
  const auto* index_data = static_cast<const std::uint32_t*>(index.data());
  const auto* view_data = static_cast<const std::uint32_t*>(view.data());
  for (py::ssize_t i = 0; i < size; ++i) {
    require(view_data[i] < kHalfLimit, function, "view", "below 2**16", std::to_string(view_data[i]),
            "Number views from 0");
  }
  py::array_t<std::uint32_t> words({size, static_cast<py::ssize_t>(num)});
  std::uint32_t* out = words.mutable_data();
  fastskel::without_gil([&] {
    const auto count = static_cast<std::size_t>(num);
    for (py::ssize_t i = 0; i < size; ++i) {
      fastskel::philox_words(seed, index_data[i], static_cast<std::uint32_t>(step), view_data[i],
                             static_cast<std::uint32_t>(use), count, out + static_cast<std::size_t>(i) * count);
    }
  });
  return words;
}

py::array_t<float> crop_resize(const py::array& clip, std::int64_t start, std::int64_t length,
                               std::int64_t out_frames) {
  const char* function = "crop_resize";
  require(is_contiguous<float>(clip, 4), function, "clip", "contiguous float32 (T, M, V, C)", describe(clip),
          "Convert it with numpy.ascontiguousarray");
  const std::int64_t frames = clip.shape(0);
  require(length >= 1 && length <= kFrameLimit, function, "length", "at least 1 and at most 2**30",
          std::to_string(length), "Crop at least one frame");
  require(out_frames >= 1 && out_frames <= kFrameLimit, function, "out_frames", "at least 1 and at most 2**30",
          std::to_string(out_frames), "Ask for at least one frame");
  require(start >= 0 && start <= frames - length, function, "crop",
          "inside the clip's " + std::to_string(frames) + " frames",
          "start " + std::to_string(start) + " and length " + std::to_string(length), "Move or shorten the crop");
  py::array_t<float> out({static_cast<py::ssize_t>(out_frames), clip.shape(1), clip.shape(2), clip.shape(3)});
  const auto* from = static_cast<const float*>(clip.data());
  float* to = out.mutable_data();
  const std::int64_t frame_size = clip.shape(1) * clip.shape(2) * clip.shape(3);
  fastskel::without_gil([&] {
    const fastskel::DefaultFloats floats;
    fastskel::crop_resize(from, frame_size, start, length, out_frames, to);
  });
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native routines of fastskel; see the stub for shapes and fastskel.philox and fastskel.data for use.";
  module.def("philox_words", &philox_words, py::arg("seed"), py::arg("index").noconvert(), py::arg("step"),
             py::arg("view").noconvert(), py::arg("use"), py::arg("num"));
  module.def("crop_resize", &crop_resize, py::arg("clip").noconvert(), py::arg("start"), py::arg("length"),
             py::arg("out_frames"));
  fastskel::bind_formats(module);
  fastskel::bind_stream(module);
  fastskel::bind_views(module);
}
