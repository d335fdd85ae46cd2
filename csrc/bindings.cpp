// Python bindings: addresses and tables come in, kernels run. Python owns every array; torch is not
// used here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/backend.h"
#ifdef SPECTRAL_CUDA
#include "cuda/backend.h"
#endif
#include "guard.h"
#include "table.h"
#include "tensors.h"

namespace py = pybind11;
using spectral::Header;

namespace {

// Names and offsets of the fields of a struct, compared with tables/schema.py when the module is
// loaded.
#define FIELD(type, name) {#name, offsetof(spectral::type, name)}
#define ITEM(type, name, i) {#name "_" #i, offsetof(spectral::type, name) + i * sizeof(int64_t)}
py::dict fields(size_t size, std::initializer_list<std::pair<const char*, size_t>> offsets) {
  py::dict found;
  for (const auto& [name, offset] : offsets) found[name] = offset;
  found["sizeof"] = size;
  return found;
}

const Header& header_at(int64_t address) { return *reinterpret_cast<const Header*>(address); }

#ifdef SPECTRAL_CUDA
// Returns the header with the addresses of the device tables in place of the host tables'.
Header device_header(int64_t address, int64_t matrices, int64_t tiles, int64_t elementwise,
                     int64_t chunks) {
  Header header = header_at(address);
  header.matrices = matrices;
  header.tiles = tiles;
  header.elementwise = elementwise;
  header.chunks = chunks;
  return header;
}

void bind_cuda(py::module_ cuda) {
  cuda.def("problem", &spectral::cuda::problem, py::arg("device"),
           "Why the kernels cannot run on a device, in CUDA's words; empty: they can.");
  cuda.def(
      "gram_matvec",
      [](int64_t header, int64_t matrices, int64_t tiles, int64_t elementwise, int64_t chunks,
         int device, int64_t stream) {
        py::gil_scoped_release unlocked;
        spectral::cuda::gram_matvec(device_header(header, matrices, tiles, elementwise, chunks),
                                    device, stream);
      },
      py::arg("header"), py::arg("matrices"), py::arg("tiles"), py::arg("elementwise"),
      py::arg("chunks"), py::arg("device"), py::arg("stream"));
  cuda.def(
      "transposed",
      [](int64_t header, int64_t matrices, int64_t tiles, int64_t elementwise, int64_t chunks,
         int device, int64_t stream) {
        py::gil_scoped_release unlocked;
        spectral::cuda::transposed(device_header(header, matrices, tiles, elementwise, chunks),
                                   device, stream);
      },
      py::arg("header"), py::arg("matrices"), py::arg("tiles"), py::arg("elementwise"),
      py::arg("chunks"), py::arg("device"), py::arg("stream"));
  cuda.def(
      "collect",
      [](int64_t header, int64_t matrices, int64_t tiles, int64_t elementwise, int64_t chunks,
         int device, int64_t stream, int64_t t, int64_t gram) {
        py::gil_scoped_release unlocked;
        spectral::cuda::collect(device_header(header, matrices, tiles, elementwise, chunks), t,
                                gram, device, stream);
      },
      py::arg("header"), py::arg("matrices"), py::arg("tiles"), py::arg("elementwise"),
      py::arg("chunks"), py::arg("device"), py::arg("stream"), py::arg("t"), py::arg("gram"));
  cuda.def(
      "rank_one",
      [](int64_t header, int64_t matrices, int64_t tiles, int64_t elementwise, int64_t chunks,
         int device, int64_t stream, bool finish, bool gradient, bool accumulate) {
        py::gil_scoped_release unlocked;
        spectral::cuda::rank_one(device_header(header, matrices, tiles, elementwise, chunks),
                                 device, stream, finish, gradient, accumulate);
      },
      py::arg("header"), py::arg("matrices"), py::arg("tiles"), py::arg("elementwise"),
      py::arg("chunks"), py::arg("device"), py::arg("stream"), py::arg("finish"),
      py::arg("gradient"), py::arg("accumulate"));
  cuda.def(
      "update",
      [](int64_t header, int64_t matrices, int64_t tiles, int64_t elementwise, int64_t chunks,
         int64_t update, int device, int64_t stream) {
        py::gil_scoped_release unlocked;
        spectral::cuda::update(device_header(header, matrices, tiles, elementwise, chunks),
                               *reinterpret_cast<const spectral::Update*>(update), device, stream);
      },
      py::arg("header"), py::arg("matrices"), py::arg("tiles"), py::arg("elementwise"),
      py::arg("chunks"), py::arg("update"), py::arg("device"), py::arg("stream"));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of spectral_kernels; the tables are described in csrc/table.h";

  py::dict tables;
  tables["Matrix"] = fields(
      sizeof(spectral::Matrix),
      {FIELD(Matrix, weight), FIELD(Matrix, grad), FIELD(Matrix, grad_dtype), FIELD(Matrix, rows),
       FIELD(Matrix, outer), FIELD(Matrix, inner), FIELD(Matrix, row_stride),
       FIELD(Matrix, outer_stride), FIELD(Matrix, grad_row_stride),
       FIELD(Matrix, grad_outer_stride), FIELD(Matrix, v_offset), FIELD(Matrix, s_offset),
       FIELD(Matrix, first_tile), FIELD(Matrix, n_tiles), FIELD(Matrix, reach)});
  tables["Tile"] = fields(sizeof(spectral::Tile), {FIELD(Tile, matrix), FIELD(Tile, row_begin),
                                                   FIELD(Tile, row_end), FIELD(Tile, t_offset)});
  tables["Operator"] =
      fields(sizeof(spectral::Operator),
             {FIELD(Operator, channels), FIELD(Operator, channel_stride),
              FIELD(Operator, first_tap), FIELD(Operator, n_taps), ITEM(Operator, count, 0),
              ITEM(Operator, count, 1), ITEM(Operator, count, 2)});
  tables["Tap"] =
      fields(sizeof(spectral::Tap),
             {FIELD(Tap, column), FIELD(Tap, is_last), ITEM(Tap, number, 0), ITEM(Tap, number, 1),
              ITEM(Tap, number, 2), ITEM(Tap, next, 0), ITEM(Tap, next, 1), ITEM(Tap, next, 2)});
  tables["Chunk"] = fields(sizeof(spectral::Chunk), {FIELD(Chunk, matrix), FIELD(Chunk, begin)});
  tables["Elementwise"] =
      fields(sizeof(spectral::Elementwise),
             {FIELD(Elementwise, weight), FIELD(Elementwise, grad), FIELD(Elementwise, grad_dtype),
              FIELD(Elementwise, size), FIELD(Elementwise, kind), FIELD(Elementwise, length),
              FIELD(Elementwise, targets)});
  tables["Moment"] =
      fields(sizeof(spectral::Moment), {FIELD(Moment, first), FIELD(Moment, second),
                                        FIELD(Moment, parameter), FIELD(Moment, group)});
  tables["Group"] = fields(sizeof(spectral::Group),
                           {FIELD(Group, lr), FIELD(Group, weight_decay), FIELD(Group, option_1),
                            FIELD(Group, option_2), FIELD(Group, eps), FIELD(Group, nesterov)});
  tables["Update"] =
      fields(sizeof(spectral::Update),
             {FIELD(Update, rule), FIELD(Update, moment_dtype), FIELD(Update, matrix_moments),
              FIELD(Update, elementwise_moments), FIELD(Update, others), FIELD(Update, n_others),
              FIELD(Update, other_moments), FIELD(Update, groups), FIELD(Update, steps),
              FIELD(Update, decoupled), FIELD(Update, grad_scale), FIELD(Update, found_inf),
              FIELD(Update, constraint)});
  tables["Header"] = fields(sizeof(spectral::Header), {FIELD(Header, weight_dtype),
                                                       FIELD(Header, matrices),
                                                       FIELD(Header, n_matrices),
                                                       FIELD(Header, tiles),
                                                       FIELD(Header, n_tiles),
                                                       FIELD(Header, elementwise),
                                                       FIELD(Header, n_elementwise),
                                                       FIELD(Header, t_partial),
                                                       FIELD(Header, gram_partial),
                                                       FIELD(Header, v),
                                                       FIELD(Header, v_next),
                                                       FIELD(Header, s),
                                                       FIELD(Header, sigmas),
                                                       FIELD(Header, residuals),
                                                       FIELD(Header, norm),
                                                       FIELD(Header, raw_penalty),
                                                       FIELD(Header, strength),
                                                       FIELD(Header, target),
                                                       FIELD(Header, scale),
                                                       FIELD(Header, exponent),
                                                       FIELD(Header, scratch_size),
                                                       FIELD(Header, n_bytes),
                                                       FIELD(Header, r),
                                                       FIELD(Header, tolerance),
                                                       FIELD(Header, chunks),
                                                       FIELD(Header, n_chunks),
                                                       FIELD(Header, chunk_squares),
                                                       FIELD(Header, arrivals),
                                                       FIELD(Header, operators),
                                                       FIELD(Header, taps),
                                                       FIELD(Header, most_taps),
                                                       FIELD(Header, above)});
  m.attr("tables") = tables;

  py::class_<spectral::TensorReader>(m, "TensorReader", py::module_local(),
                                     "Addresses and layouts of tensors; see csrc/tensors.h.")
      .def(py::init<const py::tuple&, const std::vector<int64_t>&, int64_t>(), py::arg("types"),
           py::arg("functions"), py::arg("impl_offset"))
      .def("look", &spectral::TensorReader::look, py::arg("written"), py::arg("read"));
  using Numbers = std::vector<std::vector<int64_t>>;
  py::class_<spectral::Guard>(m, "Guard", py::module_local(),
                              "What a step was prepared from; see csrc/guard.h.")
      .def(py::init([](const spectral::TensorReader& reader, const py::tuple& objects,
                       std::vector<int> grads, int64_t n_written, bool edits_grads,
                       const Numbers& columns, std::vector<int64_t> counters,
                       const Numbers& options, const Numbers& jobs, double least, double factor,
                       py::object increment_version, py::object is_inference) {
             std::vector<spectral::GradColumn> own_columns;
             for (const auto& x : columns)
               own_columns.push_back({x.at(0), x.at(1), x.at(2), x.at(3), x.at(4), x.at(5)});
             std::vector<spectral::Option> own_options;
             for (const auto& x : options) own_options.push_back({x.at(0), x.at(1), x.at(2) != 0});
             std::vector<spectral::cpu::Job> own_jobs;
             for (const auto& x : jobs)
               own_jobs.push_back(
                   {x.at(0), x.at(1), x.at(2), least, factor, x.at(3), x.at(4), x.at(5)});
             return std::make_unique<spectral::Guard>(
                 reader, objects, std::move(grads), n_written, edits_grads, std::move(own_columns),
                 std::move(counters), std::move(own_options), std::move(own_jobs),
                 std::move(increment_version), std::move(is_inference));
           }),
           py::keep_alive<1, 2>(), py::arg("reader"), py::arg("objects"), py::arg("grads"),
           py::arg("n_written"), py::arg("edits_grads"), py::arg("columns"), py::arg("counters"),
           py::arg("options"), py::arg("jobs"), py::arg("least"), py::arg("factor"),
           py::arg("increment_version"), py::arg("is_inference"))
      .def("look", &spectral::Guard::look, py::arg("objects"))
      .def("step", &spectral::Guard::step, py::arg("objects"), py::arg("threads"))
      .def("versions", &spectral::Guard::versions);
  m.def("entries", &spectral::entries, py::arg("dicts"), py::arg("keys"),
        "The values of keys in every dict, dict by dict; None for a missing one.");
  m.def("place", &spectral::place, py::arg("addresses"), py::arg("table"), py::arg("n_rows"),
        py::arg("row_bytes"), py::arg("refs"), py::arg("offsets"),
        "Write addresses into a field of a table; see csrc/tensors.h.");

  py::module_ cpu = m.def_submodule("cpu", "kernels on CPU memory");
  cpu.attr("without_openmp") = spectral::cpu::without_openmp();
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
      "transposed",
      [](int64_t header, int threads) {
        py::gil_scoped_release unlocked;
        spectral::cpu::transposed(header_at(header), threads);
      },
      py::arg("header"), py::arg("threads"));
  cpu.def(
      "collect",
      [](int64_t header, int64_t t, int64_t gram, int threads) {
        py::gil_scoped_release unlocked;
        spectral::cpu::collect(header_at(header), t, gram, threads);
      },
      py::arg("header"), py::arg("t"), py::arg("gram"), py::arg("threads"));
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
  cpu.def(
      "jumps",
      [](int64_t header, int64_t ratios, double least, double factor) {
        return spectral::cpu::jumps(header_at(header), ratios, least, factor);
      },
      py::arg("header"), py::arg("ratios"), py::arg("least"), py::arg("factor"));
  cpu.def(
      "update",
      [](int64_t header, int64_t update, int threads) {
        py::gil_scoped_release unlocked;
        spectral::cpu::update(header_at(header), *reinterpret_cast<const spectral::Update*>(update),
                              threads);
      },
      py::arg("header"), py::arg("update"), py::arg("threads"));

#ifdef SPECTRAL_CUDA
  bind_cuda(m.def_submodule("cuda", "kernels on the memory of CUDA devices"));
#endif
}
