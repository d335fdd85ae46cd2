// SGD, see update.cuh.

#include "update.cuh"

namespace spectral {
namespace cuda {
void sgd(const Header& header, const Update& update, int device, int64_t stream) {
  if (update.constraint == kSphere)
    launch_rule<SgdOnSphere<float, void>>(header, update, device, stream);
  else if (caps_several(header, update))
    launch_rule<Sgd<float, void>, true>(header, update, device, stream);
  else
    launch_rule<Sgd<float, void>>(header, update, device, stream);
}

}  // namespace cuda
}  // namespace spectral
