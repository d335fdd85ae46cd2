// s = W v and t = W^T s per tile, norms and penalties of the elementwise: see products.cuh.

#include "backend.h"
#include "elementwise.cuh"
#include "products.cuh"
#include "subspace.h"

namespace spectral {
namespace cuda {
namespace {

template <class T>
__device__ __forceinline__ double products(const Matrix& m, const Tile& tile, const Operands& o,
                                           int64_t shared_floats) {
  if (!is_aligned<T>(m.weight, m.row_stride, m.outer * m.inner, m.outer)) {
    const Rows<T, false> w(m, tile);
    if (w.n <= 4 * 32) return short_rows<4, 4>(w, o);
    return long_rows<8, 4, true>(w, o, shared_floats);
  }
  const Rows<T, true> w(m, tile);
  constexpr int kWidth = kPerLoad<T>, kBlock = kThreads * kWidth, kMaxShort = 512;
  constexpr int kPieces = kMaxShort / (32 * kWidth);
  if (w.n <= 32 * kWidth) return short_rows<1, 8>(w, o);
  if (w.n <= kMaxShort) return short_rows<kPieces, 8 / kPieces>(w, o);
  if (w.n <= kBlock) return long_rows<1, 16, false>(w, o, shared_floats);
  if (w.n <= 2 * kBlock) return long_rows<2, 8, false>(w, o, shared_floats);
  if (w.n <= 4 * kBlock) return long_rows<4, 4, false>(w, o, shared_floats);
  if (sizeof(T) == 2 || w.n <= 16 * kBlock) return long_rows<8, 2, true>(w, o, shared_floats);
  return long_rows<16, 1, true>(w, o, shared_floats);
}

// Block i < n_tiles takes tile i, the following n_elementwise blocks an elementwise parameter each.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    gram_matvec_kernel(const Header header, int64_t shared_floats) {
  const int64_t block = blockIdx.x;
  if (block >= header.n_tiles) return elementwise_norm<T>(header, block - header.n_tiles);
  const Tile& tile = at<const Tile>(header.tiles)[block];
  if (!takes_part(header, tile.matrix)) return;
  const Matrix& m = at<const Matrix>(header.matrices)[tile.matrix];
  const Operands operands = operands_of(header, tile, m, header.v);
  const double squares = sum_over_block(products<T>(m, tile, operands, shared_floats));
  if (threadIdx.x == 0) at<double>(header.gram_partial)[block] = squares;
}

template <class T>
void launch_gram_matvec(const Header& header, int device, int64_t stream) {
  const int64_t bytes = bytes_for_t(header, device, "gram_matvec");
  launch<Header, int64_t>("gram_matvec", gram_matvec_kernel<T>,
                          header.n_tiles + header.n_elementwise, kThreads, bytes, stream, header,
                          bytes / (int64_t)sizeof(float));
}

}  // namespace

std::string problem(int device) {
  const char* what = "the CUDA kernels";
  try {
    const DeviceGuard guard(device, what);
    cudaFuncAttributes attributes;
    const auto* kernel = reinterpret_cast<const void*>(gram_matvec_kernel<float>);
    check(cudaFuncGetAttributes(&attributes, kernel), what);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

void gram_matvec(const Header& header, int device, int64_t stream) {
  check_dtype(header, "gram_matvec");
  if (header.n_tiles + header.n_elementwise == 0) return;
  const DeviceGuard guard(device, "gram_matvec");
  Header now = header;
  if (header.tolerance > 0) now.v = header.v_next;
  if (header.r > 1)
    subspace_products("gram_matvec", now, stream);
  else if (header.weight_dtype == kFloat32)
    launch_gram_matvec<float>(now, device, stream);
  else if (header.weight_dtype == kBFloat16)
    launch_gram_matvec<__nv_bfloat16>(now, device, stream);
  else
    launch_gram_matvec<__half>(now, device, stream);
}

}  // namespace cuda
}  // namespace spectral
