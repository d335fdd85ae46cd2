// SGD, see update.cuh.

#include "update.cuh"

namespace spectral {
namespace cuda {
namespace {

struct Sgd {
  static constexpr int kMoments = 1;  // none is stored without momentum
  float lr, weight_decay, momentum, weight;
  bool nesterov;

  Sgd() = default;
  __device__ Sgd(const Group& group, double step)
      : lr((float)group.lr),
        weight_decay((float)group.weight_decay),
        momentum((float)group.option_1),
        weight((float)(step > 1 && group.option_1 != 0 ? 1 - group.option_2 : 1)),
        nesterov(group.nesterov != 0) {}

  __device__ __forceinline__ void operator()(float& p, float g, float& m1, float&) const {
    g += weight_decay * p;
    m1 = momentum * m1 + weight * g;
    p -= lr * (nesterov ? g + momentum * m1 : m1);
  }
};

}  // namespace

void sgd(const Header& header, const Update& update, int device, int64_t stream) {
  launch_rule<Sgd>(header, update, device, stream);
}

}  // namespace cuda
}  // namespace spectral
