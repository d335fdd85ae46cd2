// SGD, see update.cuh.

#include "update.cuh"

namespace spectral {
namespace cuda {
void sgd(const Header& header, const Update& update, int device, int64_t stream) {
  launch_rule<Sgd<float, void>>(header, update, device, stream);
}

}  // namespace cuda
}  // namespace spectral
