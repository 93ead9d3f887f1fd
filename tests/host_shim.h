// CUDA's words for a host compiler: grid and block are loops, one thread after the other. Exact for kernels without
// shared memory and without __syncthreads, and only for those: there is no word for either here.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cmath>
#include <utility>

#define __global__
#define __device__

struct Index {
    unsigned x, y, z;
};
static Index blockIdx, threadIdx, blockDim, gridDim;

static inline int atomicMin(int *at, int value) {
    const int old = *at;
    if (value < old) *at = value;
    return old;
}

// The conversions that a GPU has as instructions: round to nearest, ties to even.
static inline float float_from_half(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7FFFu, sign = (uint32_t)(bits & 0x8000u) << 16;
    if (magnitude < 0x0400u) {
        const float tiny = (float)magnitude * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    const uint32_t wide = (magnitude << 13) + ((magnitude >= 0x7C00u ? 224u : 112u) << 23) | sign;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t half_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);  // 65520 and beyond
    if (magnitude >= 0x38800000u) {
        const uint32_t odd = magnitude >> 13 & 1u;
        return (uint16_t)(sign | (magnitude - (112u << 23) + 0x0FFFu + odd) >> 13);
    }
    float size;
    std::memcpy(&size, &magnitude, 4);
    return (uint16_t)(sign | (uint32_t)std::nearbyint(size * 0x1p24f));  // subnormal; exact but for the rounding
}

struct Geometry {
    Index grid, block;
    int backwards;
};

// Runs a kernel as the driver does: arguments[i] is the address of argument i.
template <typename... A, std::size_t... I>
static void run(void (*kernel)(A...), const Geometry &geometry, void **arguments, std::index_sequence<I...>) {
    gridDim = geometry.grid, blockDim = geometry.block;
    const std::uint64_t blocks = (std::uint64_t)gridDim.x * gridDim.y * gridDim.z;
    const std::uint64_t threads = (std::uint64_t)blockDim.x * blockDim.y * blockDim.z, all = blocks * threads;
    for (std::uint64_t number = 0; number < all; ++number) {
        const std::uint64_t n = geometry.backwards ? all - 1 - number : number, b = n / threads, t = n % threads;
        blockIdx = {(unsigned)(b % gridDim.x), (unsigned)(b / gridDim.x % gridDim.y),
                    (unsigned)(b / gridDim.x / gridDim.y)};
        threadIdx = {(unsigned)(t % blockDim.x), (unsigned)(t / blockDim.x % blockDim.y),
                     (unsigned)(t / blockDim.x / blockDim.y)};
        kernel(*static_cast<A *>(arguments[I])...);
    }
}

// The sizes of a kernel's arguments, into sizes; their number is returned. Pointers count as -8.
template <typename... A>
static int sizes_of(void (*)(A...), int *sizes) {
    const int all[] = {(std::is_pointer<A>::value ? -(int)sizeof(A) : (int)sizeof(A))...};
    std::memcpy(sizes, all, sizeof(all));
    return (int)sizeof...(A);
}

template <typename... A>
static void launch(void (*kernel)(A...), const Geometry &geometry, void **arguments) {
    run(kernel, geometry, arguments, std::index_sequence_for<A...>{});
}
