// Parsers of raw files for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.h"
#include "core/ntu_text.h"

namespace py = pybind11;

namespace fastskel {

namespace {

// more than any body has, and few enough for sizes never to overflow
constexpr std::int64_t kJointLimit = 1024;

// the array owns the vector: nothing is copied
template <typename T>
py::array_t<T> as_array(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto vector = std::make_unique<std::vector<T>>(std::move(values));
  const T* data = vector->data();
  const py::capsule owner(vector.get(), [](void* owned) { delete static_cast<std::vector<T>*>(owned); });
  vector.release();
  return py::array_t<T>(std::move(shape), data, owner);
}

py::tuple parse_ntu_file(const py::bytes& data, const std::string& path, std::int64_t num_joints, bool all_values) {
  if (num_joints < 1 || num_joints > kJointLimit) {
    throw py::value_error("parse_ntu: num_joints must be from 1 to " + std::to_string(kJointLimit) + ", got " +
                          std::to_string(num_joints) + ". Give the joints of a body.");
  }
  const std::string_view text = data;
  NtuText parsed;
  try {
    without_gil([&] { parsed = parse_ntu(text.data(), text.size(), static_cast<std::size_t>(num_joints), all_values); });
  } catch (const NtuError& error) {
    throw py::value_error(std::string("pack_source: ") + error.what() + ", in " + path +
                          ". Fetch the file again or remove it.");
  }
  const auto num_frames = static_cast<py::ssize_t>(parsed.num_bodies.size());
  const auto num_bodies = static_cast<py::ssize_t>(parsed.ids.size());
  const auto num_values = static_cast<py::ssize_t>(all_values ? kNtuJointValues : kNtuCoordinates);
  return py::make_tuple(
      as_array(std::move(parsed.num_bodies), {num_frames}), as_array(std::move(parsed.ids), {num_bodies}),
      as_array(std::move(parsed.trackers), {num_bodies, static_cast<py::ssize_t>(kNtuBodyValues)}),
      as_array(std::move(parsed.joints), {num_bodies, static_cast<py::ssize_t>(num_joints), num_values}));
}

}  // namespace

void bind_formats(py::module_& module) {
  module.def("parse_ntu", &parse_ntu_file, py::arg("data"), py::arg("path"), py::arg("num_joints"),
             py::arg("all_values") = false);
}

}  // namespace fastskel
