// Programs of views from their description in Python, and views made in one thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cfloat>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "core/clips.h"
#include "core/float_mode.h"
#include "core/view.h"
#include "core/view_rows.h"

namespace py = pybind11;

namespace fastskel {

void require(bool ok, const char* function, const char* argument, const std::string& contract, const std::string& actual,
             const char* remedy) {
  if (ok) return;
  throw py::value_error(std::string(function) + ": " + argument + " must be " + contract + ", got " + actual + ". " +
                        remedy + ".");
}

namespace {

constexpr const char* kFunction = "view_program";
constexpr const char* kRemedy = "Make the description with fastskel.data.program.view_program";

std::string shown(const py::handle& value) { return py::repr(value).cast<std::string>(); }

py::object entry(const py::dict& description, const char* key) {
  require(description.contains(key), kFunction, key, "there", "none", kRemedy);
  return description[key];
}

std::int64_t integer(const py::handle& value, const char* key, std::int64_t low = std::numeric_limits<std::int64_t>::min(),
                     std::int64_t high = std::numeric_limits<std::int64_t>::max()) {
  int overflow = 0;
  std::int64_t number = 0;
  py::object index;
  if (PyBool_Check(value.ptr()) == 0) index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (index) number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  PyErr_Clear();
  require(index && overflow == 0 && low <= number && number <= high, kFunction, key, "a whole number in its range",
          shown(value), kRemedy);
  return number;
}

float real(const py::handle& value, const char* key) {
  const double number = PyFloat_AsDouble(value.ptr());
  const bool converted = !(number == -1.0 && PyErr_Occurred() != nullptr);
  if (!converted) PyErr_Clear();
  // the conversion of a double beyond float32 is undefined
  require(converted && number >= -FLT_MAX && number <= FLT_MAX, kFunction, key, "a finite float32", shown(value), kRemedy);
  return static_cast<float>(number);
}

bool flag(const py::handle& value, const char* key) {
  require(PyBool_Check(value.ptr()) != 0, kFunction, key, "True or False", shown(value), kRemedy);
  return value.ptr() == Py_True;
}

std::string text(const py::handle& value, const char* key) {
  require(py::isinstance<py::str>(value), kFunction, key, "a string", shown(value), kRemedy);
  return value.cast<std::string>();
}

py::tuple items(const py::handle& value, const char* key) {
  const bool listed = py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value);
  require(listed, kFunction, key, "a list or tuple", shown(value), kRemedy);
  return py::reinterpret_borrow<py::object>(value);
}

std::vector<std::int32_t> joints_from(const py::handle& value, const char* key) {
  std::vector<std::int32_t> joints;
  for (const py::handle& joint : items(value, key)) {
    joints.push_back(static_cast<std::int32_t>(integer(joint, key, 0, std::numeric_limits<std::int32_t>::max())));
  }
  return joints;
}

template <typename Value, std::size_t kNum>
Value named(const std::string& name, const std::pair<const char*, Value> (&names)[kNum], const char* key) {
  std::string known;
  for (const auto& [candidate, value] : names) {
    if (name == candidate) return value;
    known += (known.empty() ? "" : ", ") + std::string(candidate);
  }
  require(false, kFunction, key, "one of " + known, "'" + name + "'", kRemedy);
  return names[0].second;
}

Transform transform_from(const py::handle& value, bool is_option) {
  using Kind = Transform::Kind;
  require(py::isinstance<py::dict>(value), kFunction, "transforms", "a list of dicts", shown(value), kRemedy);
  const auto description = py::reinterpret_borrow<py::dict>(value);
  static constexpr std::pair<const char*, Kind> kKinds[] = {
      {"joint-corruption", Kind::kCorruption}, {"shear", Kind::kShear},      {"rotation", Kind::kRotation},
      {"scaling", Kind::kScaling},             {"joint-mask", Kind::kJointMask}, {"one-of", Kind::kOneOf},
      {"mirror", Kind::kMirror},               {"noise", Kind::kNoise},      {"blur", Kind::kBlur},
      {"frame-mask", Kind::kFrameMask},        {"body-mask", Kind::kBodyMask}};
  const auto field = [&](const char* key) { return entry(description, key); };
  Transform transform;
  transform.kind = named(text(field("kind"), "kind"), kKinds, "kind");
  const Kind kind = transform.kind;
  require(!(is_option && kind == Kind::kOneOf), kFunction, "options", "transforms other than one-of", "one-of", kRemedy);
  if (kind == Kind::kCorruption) {
    transform.probability = real(field("zero_probability"), "zero_probability");
  } else if (kind != Kind::kShear && kind != Kind::kOneOf) {
    transform.probability = real(field("probability"), "probability");
  }
  if (kind == Kind::kCorruption || kind == Kind::kJointMask || kind == Kind::kFrameMask) {
    transform.count = integer(field("count"), "count");
  }
  if (kind == Kind::kScaling || kind == Kind::kBlur) {
    transform.low = real(field("low"), "low");
    transform.high = real(field("high"), "high");
  }
  switch (kind) {
    case Kind::kShear: transform.high = real(field("amplitude"), "amplitude"); break;
    case Kind::kNoise: transform.high = real(field("std"), "std"); break;
    case Kind::kScaling: transform.flag = flag(field("per_axis"), "per_axis"); break;
    case Kind::kRotation: {
      const py::tuple angles = items(field("angles"), "angles");
      require(angles.size() == 3, kFunction, "angles", "three numbers", shown(angles), kRemedy);
      for (std::size_t axis = 0; axis < 3; ++axis) transform.angles[axis] = real(angles[axis], "angles");
      break;
    }
    case Kind::kMirror:
      transform.joints = joints_from(field("joints"), "joints");
      transform.flag = flag(field("reflect"), "reflect");
      break;
    case Kind::kBlur: {
      static constexpr std::pair<const char*, bool> kPaddings[] = {{"edge", false}, {"zero", true}};
      transform.count = integer(field("taps"), "taps");
      transform.flag = flag(field("normalise"), "normalise");
      transform.zero_padding = named(text(field("padding"), "padding"), kPaddings, "padding");
      break;
    }
    case Kind::kOneOf:
      for (const py::handle& option : items(field("options"), "options")) {
        transform.options.push_back(transform_from(option, true));
      }
      break;
    default: break;
  }
  return transform;
}

void read_crop(const py::object& value, ViewProgram& program) {
  const py::tuple crop = items(value, "crop");
  const std::string kind = crop.empty() ? "" : text(crop[0], "crop");
  program.random_crop = kind == "random";
  require((kind == "random" && crop.size() == 4) || (kind == "center" && crop.size() == 2), kFunction, "crop",
          "('random', low, high, min_frames) or ('center', ratio)", shown(crop), kRemedy);
  if (program.random_crop) {
    program.low = integer(crop[1], "crop");
    program.high = integer(crop[2], "crop");
    program.min_frames = integer(crop[3], "crop");
  } else {
    program.high = integer(crop[1], "crop");
  }
}

void read_alignment(const py::object& value, ViewProgram& program) {
  if (value.is_none()) return;
  using Table = py::array_t<double, py::array::c_style>;
  const bool fits = Table::check_(value) && py::reinterpret_borrow<Table>(value).ndim() == 3;
  require(fits, kFunction, "alignment", "None or contiguous float64 (n, 4, 3)", shown(py::type::of(value)), kRemedy);
  const auto table = py::reinterpret_borrow<Table>(value);
  require(table.shape(1) == 4 && table.shape(2) == 3, kFunction, "alignment", "float64 (n, 4, 3)",
          shown(value.attr("shape")), kRemedy);
  program.alignment.assign(table.data(), table.data() + table.size());
}

}  // namespace

ViewProgram program_from(const py::dict& description) {
  static constexpr std::pair<const char*, Normalise> kNormalisations[] = {{"none", Normalise::kNone},
                                                                          {"center", Normalise::kCenter},
                                                                          {"center-first", Normalise::kCenterFirst},
                                                                          {"align", Normalise::kAlign}};
  static constexpr std::pair<const char*, Stream> kStreams[] = {
      {"joint", Stream::kJoint}, {"bone", Stream::kBone}, {"motion", Stream::kMotion}};
  ViewProgram program;
  program.frames = integer(entry(description, "frames"), "frames");
  read_crop(entry(description, "crop"), program);
  program.normalise = named(text(entry(description, "normalise"), "normalise"), kNormalisations, "normalise");
  program.centre_joint = integer(entry(description, "centre_joint"), "centre_joint");
  read_alignment(entry(description, "alignment"), program);
  for (const py::handle& transform : items(entry(description, "transforms"), "transforms")) {
    program.transforms.push_back(transform_from(transform, false));
  }
  program.stream = named(text(entry(description, "stream"), "stream"), kStreams, "stream");
  const py::object parents = entry(description, "parents");
  if (!parents.is_none()) program.parents = joints_from(parents, "parents");
  try {
    check_program(program);
  } catch (const Error& error) {
    throw py::value_error(error.what());
  }
  return program;
}

DType dtype_from(const std::string& name) {
  static constexpr std::pair<const char*, DType> kTypes[] = {
      {"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}};
  return named(name, kTypes, "dtype");
}

ViewMakers::ViewMakers(const Clips& clips, const std::vector<py::dict>& programs, std::uint64_t seed, const std::string& dtype,
                       const std::optional<std::vector<std::uint32_t>>& numbers)
    : clips_(&clips), type_(dtype_from(dtype)) {
  const char* function = "ViewMakers";
  require(!programs.empty() && programs.size() < (1u << 16), function, "programs", "in 1 .. 65535",
          std::to_string(programs.size()), "Give views");
  require(!numbers || numbers->size() == programs.size(), function, "views", "one number per program",
          numbers ? std::to_string(numbers->size()) : "", "Number the views");
  for (const py::dict& program : programs) {
    const std::size_t i = makers_.size();
    makers_.emplace_back(clips, program_from(program), seed, numbers ? (*numbers)[i] : static_cast<std::uint32_t>(i));
  }
}

py::dtype ViewMakers::array_type() const {
  return py::dtype(type_ == DType::kFloat32 ? "float32" : type_ == DType::kFloat16 ? "float16" : "uint16");
}

std::vector<py::ssize_t> ViewMakers::shape(std::size_t view, py::ssize_t rows) const {
  const FrameShape& shape = clips_->shape();
  return {rows, makers_[view].frames(), shape.bodies, shape.joints, shape.channels};
}

Views ViewMakers::make(std::int64_t epoch, const py::array& index) const {
  const char* function = "ViewMakers.make";
  using Index = py::array_t<std::int64_t, py::array::c_style>;
  require(epoch >= 0 && epoch < (std::int64_t{1} << 32), function, "epoch", "in [0, 2**32)", std::to_string(epoch),
          "Count epochs from 0");
  require(Index::check_(index) && index.ndim() == 1, function, "index", "contiguous int64 (N,)",
          shown(index.dtype()) + " " + shown(index.attr("shape")), "Convert it with numpy.ascontiguousarray");
  const auto* numbers = static_cast<const std::int64_t*>(index.data());
  Views views;
  std::vector<std::pair<char*, std::uint8_t*>> data;
  for (std::size_t i = 0; i < makers_.size(); ++i) {
    const std::vector<py::ssize_t> sizes = shape(i, index.shape(0));
    views.emplace_back(py::array(array_type(), sizes),
                       py::array(py::dtype::of<bool>(), std::vector<py::ssize_t>(sizes.begin(), sizes.begin() + 3)));
    data.emplace_back(static_cast<char*>(views[i].first.mutable_data()),
                      static_cast<std::uint8_t*>(views[i].second.mutable_data()));
  }
  without_gil([&] {
    const DefaultFloats floats;
    Scratch scratch;
    clips_->check_unchanged();
    const py::ssize_t rows = index.shape(0);
    for (py::ssize_t row = 0; row < rows; ++row) {
      if (row + 1 < rows) scratch.read_ahead(clips_->clip(numbers[row + 1]), clips_->shape());
      for (std::size_t i = 0; i < makers_.size(); ++i) {
        const std::size_t bytes = static_cast<std::size_t>(makers_[i].size()) * size_of(type_);
        makers_[i].make(numbers[row], static_cast<std::uint32_t>(epoch), type_,
                        data[i].first + static_cast<std::size_t>(row) * bytes,
                        data[i].second + row * makers_[i].mask_size(), scratch);
      }
    }
    // a file that lost its end while it was read shows zeros there
    clips_->check_unchanged();
  });
  return views;
}

namespace {

void set_instructions(const std::string& name) {
  require(select_instructions(name.c_str()), "set_instructions", "name", "avx512, avx2 or baseline, and of this processor",
          "'" + name + "'", "Choose another");
}

}  // namespace

void bind_views(py::module_& module) {
  py::class_<ViewMakers>(module, "ViewMakers")
      .def(py::init<const Clips&, const std::vector<py::dict>&, std::uint64_t, const std::string&,
                    const std::optional<std::vector<std::uint32_t>>&>(),
           py::arg("clips"), py::arg("programs"), py::kw_only(), py::arg("seed"), py::arg("dtype"),
           py::arg("views") = py::none(), py::keep_alive<1, 2>())
      .def("make", &ViewMakers::make, py::arg("epoch"), py::arg("index").noconvert());
  module.def("set_instructions", &set_instructions, py::arg("name"));
  module.def("instructions", [] { return row_kernels().name; });
}

}  // namespace fastskel
