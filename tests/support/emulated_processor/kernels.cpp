// The C++ kernels in a process of their own, without Python and torch: it may be a program of
// another processor. It maps a file at an address, says that it is ready, and then runs a call per
// line of its input: the name, the number of threads, the address of the header, and what else the
// function takes. It answers every call with a line, which is the call's result.
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>

#include "cpu/backend.h"

namespace cpu = spectral::cpu;

namespace {

int64_t next() {
  int64_t value;
  std::cin >> value;
  return value;
}

// The result of a call; exits if there is no such function.
int64_t call(const std::string& name, int threads) {
  const spectral::Header& header = *reinterpret_cast<const spectral::Header*>(next());
  if (name == "gram_matvec") {
    cpu::gram_matvec(header, threads);
  } else if (name == "transposed") {
    cpu::transposed(header, threads);
  } else if (name == "collect") {
    const int64_t t = next(), gram = next();
    cpu::collect(header, t, gram, threads);
  } else if (name == "normalize") {
    cpu::normalize(header, threads);
  } else if (name == "rank_one") {
    cpu::rank_one(header, next() != 0, threads);
  } else if (name == "update") {
    cpu::update(header, *reinterpret_cast<const spectral::Update*>(next()), threads);
  } else if (name == "jumps") {
    const int64_t ratios = next();
    double least, factor;
    std::cin >> least >> factor;
    return cpu::jumps(header, ratios, least, factor);
  } else {
    std::cerr << "no function " << name << std::endl;
    exit(1);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int file = open(argv[1], O_RDWR);
  void* const address = reinterpret_cast<void*>(strtoull(argv[2], nullptr, 10));
  const size_t size = strtoull(argv[3], nullptr, 10);
  // Not over what the program has there already.
  if (file < 0 || mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE,
                       file, 0) != address) {
    perror(argv[1]);
    return 1;
  }
  std::cout << "ready" << std::endl;
  std::string name;
  for (int threads; std::cin >> name >> threads;) std::cout << call(name, threads) << std::endl;
}
