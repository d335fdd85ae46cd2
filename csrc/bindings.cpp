// Addresses and tables in, kernels run. Python owns every array; nothing here knows torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/backend.h"
#include "table.h"
#include "tensors.h"

namespace py = pybind11;
using spectral::Header;

namespace {

const Header& header_at(int64_t address) { return *reinterpret_cast<const Header*>(address); }

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of spectral_kernels; the tables are described in csrc/table.h";

  py::dict sizes;
  sizes["matrix"] = sizeof(spectral::Matrix);
  sizes["tile"] = sizeof(spectral::Tile);
  sizes["vector"] = sizeof(spectral::Vector);
  sizes["header"] = sizeof(Header);
  m.attr("table_sizes") = sizes;

  m.def("describe", &spectral::describe, py::arg("type"), py::arg("tensors"),
        "Addresses and layouts of tensors of a type, as bytes; None: ask each of them.");

  py::module_ cpu = m.def_submodule("cpu", "kernels on CPU memory");
  cpu.attr("openmp") = spectral::cpu::has_openmp();
  cpu.def("levels", &spectral::cpu::levels, "Instruction-set levels this processor can run.");
  cpu.def("level", &spectral::cpu::level, "The level in use.");
  cpu.def("set_level", &spectral::cpu::set_level, py::arg("name"));
  cpu.def(
      "gram_matvec",
      [](int64_t header, int threads) {
        py::gil_scoped_release unlocked;
        spectral::cpu::gram_matvec(header_at(header), threads);
      },
      py::arg("header"), py::arg("threads"));
  cpu.def(
      "normalize",
      [](int64_t header, int threads) {
        py::gil_scoped_release unlocked;
        spectral::cpu::normalize(header_at(header), threads);
      },
      py::arg("header"), py::arg("threads"));
  cpu.def(
      "rank_one",
      [](int64_t header, bool accumulate, int threads) {
        py::gil_scoped_release unlocked;
        spectral::cpu::rank_one(header_at(header), accumulate, threads);
      },
      py::arg("header"), py::arg("accumulate"), py::arg("threads"));
}
