#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace tars {
namespace {

const Kernels& choose() {
  const char* forced = std::getenv("TARS_CPU_ISA");
  const std::string_view wanted = forced ? forced : "";
  const Kernels *wide = avx512_kernels(), *middle = avx2_kernels();
  if (wide && (wanted.empty() || wanted == wide->name)) return *wide;
  if (middle && (wanted.empty() || wanted == middle->name)) return *middle;
  if (!wanted.empty() && wanted != "portable") return wide ? *wide : middle ? *middle : portable_kernels();  // not here: the best there is
  return portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace tars
