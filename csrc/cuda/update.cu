// An optimizer's step by its rule.

#include "update.cuh"

namespace spectral {
namespace cuda {

void update(const Header& header, const Update& update, int device, int64_t stream) {
  check_dtype(header, "update");
  if (update.moment_dtype != header.weight_dtype && update.moment_dtype != kFloat32)
    throw std::invalid_argument("update: moments are of the weights' dtype or float32");
  if (header.n_tiles + header.n_vectors + update.n_others == 0) return;
  const DeviceGuard guard(device, "update");
  const auto step = update.rule == kAdamW ? adamw : sgd;
  step(header, update, device, stream);
}

}  // namespace cuda
}  // namespace spectral
