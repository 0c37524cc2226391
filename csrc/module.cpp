// `_C`: the face of all that is not a tensor op. Build and CPU information, the table of kernels, forcing a level.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "direct_module.h"
#include "families.h"
#include "runtime/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and CPU information, the table of kernels, forcing an ISA level.";
  if (!fs::direct::add_to(m.ptr())) throw py::error_already_set();
  m.def("build_info", &fs::build_info, "How this binary was built: name -> value.");
  m.def("isa", [] { return std::string(fs::isa::level_name(fs::isa::current_level())); }, "The ISA level in use.");
  m.def("isa_reason", &fs::isa::level_reason, "Why that level.");
  m.def(
      "isa_available",
      [] {
        std::vector<std::string> names;
        for (fs::isa::Level level : fs::isa::available_levels()) names.emplace_back(fs::isa::level_name(level));
        return names;
      },
      "The levels of this CPU, best first.");
  m.def("set_isa", &fs::isa::set_level, py::arg("level"),
        "Caps the ISA level for the whole process; '' returns to FASTSPARSE_ISA. ValueError for a level that is not "
        "here.");
  m.def(
      "kernels",
      [] {
        py::list rows;
        for (const fs::KernelInfo& k : fs::kernels()) {
          py::dict row;
          row["family"] = k.family;
          row["name"] = k.name;
          row["level"] = k.level;
          row["tile"] = k.tile;
          row["usable"] = k.usable;
          row["selected"] = k.selected;
          row["proven"] = k.proven;
          rows.append(row);
        }
        return rows;
      },
      "One dict per row of every family's table: family, name, level, tile, usable (now), selected (now), proven.");
  m.def("scratch_allocations", &fs::scratch_allocations, "Scratch buffers allocated so far in this process.");
  m.def("spoil_kernel", &fs::spoil_kernel, py::arg("family"), py::arg("name"),
        "Test hook: makes one row of a table wrong by one; name '' mends it.");
  m.def("pin_sparse_matmul", &fs::pin_sparse_matmul, py::arg("name"), "The same for the family sparse_matmul.");
  m.def("pin_sparse_int8", &fs::pin_sparse_int8, py::arg("name"),
        "Test hook: this row of sparse_int8 runs, whatever comes before it; name '' ends it.");
  m.def("time_int8_linear", &fs::time_int8_linear, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("repeats"),
        py::arg("copies") = 1, py::call_guard<py::gil_scoped_release>(),
        "Seconds per call of the int8_linear kernel alone (no dispatcher), float32, over `copies` weights in turn.");
  m.def("time_weight_only_linear", &fs::time_weight_only_linear, py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("bits"), py::arg("group"), py::arg("repeats"), py::arg("copies") = 1,
        py::call_guard<py::gil_scoped_release>(),
        "The same for weight_only_linear: bits 8, or 4 with a group of 32, 64 or 128.");
  m.def("time_kl_div", &fs::time_kl_div, py::arg("rows"), py::arg("classes"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>(),
        "Seconds per forward and gradient of kl_div alone (no dispatcher, no allocation), float32.");
  m.def("time_sparse_linear", &fs::time_sparse_linear, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("density"),
        py::arg("format"), py::arg("repeats"), py::arg("copies") = 1, py::call_guard<py::gil_scoped_release>(),
        "Seconds per call of the sparse_linear kernel alone (no dispatcher), over `copies` weights in turn.");
}
