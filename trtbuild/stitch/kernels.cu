// What `stitch`, `runtime/tiles` and `volume/back` define, on a GPU. Each kernel names the NumPy function that defines
// it; the tests compile this file for the host, too, and hold it to that function bit for bit.
//
// Rules of this file:
// - Arrays lie in C order unless strides (in elements) are given. A name's suffix gives the types: `blend_f16_f32`
//   reads half logits and adds them into a float accumulator.
// - Every kernel walks its voxels in strides of the whole grid, so that its result does not depend on the launch. Along
//   threadIdx.x lie neighbours in memory. No shared memory, no thread waits for another, no float is added atomically.
// - A product and a sum are two roundings, as in the functions that define them: compile with --fmad=false.
// - `long long` wherever voxels are counted over more than one axis of an image.
//
// Nothing is included: NVRTC needs no header of CUDA's then.

typedef unsigned char u8;
typedef unsigned short u16;
typedef long long i64;

struct Half {
    u16 bits;
};

// One new voxel of a linear interpolation along one axis: old[low] + weight * (old[high] - old[low]).
struct Tap {
    int low, high;
    float weight;
};

#ifdef __CUDACC__
__device__ inline float float_from_half(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline u16 half_from_float(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ inline float wide(float value) { return value; }
__device__ inline float wide(Half value) { return float_from_half(value.bits); }
__device__ inline void put(float &into, float value) { into = value; }
__device__ inline void put(Half &into, float value) { into.bits = half_from_float(value); }
__device__ inline bool finite(float value) { return value - value == 0.0f; }
__device__ inline bool finite(Half value) { return (value.bits & 0x7C00) != 0x7C00; }

// Position `i` of an axis of `n` voxels, counted from the other end where it is mirrored.
__device__ inline int turned(int i, int n, bool mirrored) { return mirrored ? n - 1 - i : i; }
__device__ inline bool within(int i, int n) { return 0 <= i && i < n; }

#define EACH(index, axis, count)                                                                \
    for (unsigned index = blockIdx.axis * blockDim.axis + threadIdx.axis; index < (unsigned)(count); \
         index += blockDim.axis * gridDim.axis)

enum Flip { FLIP_Z = 1, FLIP_Y = 2, FLIP_X = 4 };

// gather: image (channels, depth, height, width), tiles (batch, 4) -> out (batch, channels, pz, py, px)
//
// out[b] = mirrored(window_from_image(padded(image, grid), start, patch), flip) of runtime/tiles.py, where tiles[b] is
// (z, y, x of the start in the padded grid, Flip bits), and the image begins at `offset` of the padded grid.
// One thread per voxel of a row; reads 4 bytes and writes 4 (f32) or 2 (f16) per voxel.
template <typename Out>
__device__ void gather(const float *image, Out *out, const int *tiles, int batch, int channels, int depth, int height,
                       int width, int offset_z, int offset_y, int offset_x, int pz, int py, int px) {
    EACH(plane, z, batch * channels) {
        const int channel = (int)(plane % channels);
        const int *tile = tiles + 4 * (plane / channels);
        const int flip = tile[3];
        EACH(row, y, pz * py) {
            const int z = tile[0] + turned((int)(row / py), pz, flip & FLIP_Z) - offset_z;
            const int y = tile[1] + turned((int)(row % py), py, flip & FLIP_Y) - offset_y;
            const bool hit = within(z, depth) && within(y, height);
            const i64 from = (((i64)channel * depth + z) * height + y) * width;
            const i64 into = ((i64)plane * (pz * py) + row) * px;
            EACH(i, x, px) {
                const int x = tile[2] + turned((int)i, px, flip & FLIP_X) - offset_x;
                put(out[into + i], hit && within(x, width) ? image[from + x] : 0.0f);
            }
        }
    }
}

// blend: logits (batch, heads, pz, py, px) of tiles with one start -> total (heads, depth, height, width), in place
//
// add_window(total, logits[b], (wz, wy, wx), start, flip) of stitch/accumulate.py for b = 0, 1, ...: in float32 with
// its operations in its order, rounded to half after every addition where the accumulator is half. `start` counts from
// the accumulator's first voxel; tiles (batch, 4) gives the Flip bits.
// A sum that is NaN or infinite sets status[0] to the smallest `first_tile + b` that has one, if that is smaller.
// One thread per voxel of the window; reads a logit of every tile, and reads and writes the accumulator once.
template <typename Logit, typename Sum>
__device__ void blend(const Logit *logits, Sum *total, const float *wz, const float *wy, const float *wx,
                      const int *tiles, int *status, int first_tile, int batch, int heads, int depth, int height,
                      int width, int start_z, int start_y, int start_x, int pz, int py, int px) {
    EACH(head, z, heads) {
        EACH(row, y, pz * py) {
            const int z = (int)(row / py), y = (int)(row % py);
            const float weight = wz[z] * wy[y];
            const i64 into = (((i64)head * depth + start_z + z) * height + start_y + y) * width + start_x;
            EACH(x, x, px) {
                const float here = weight * wx[x];
                Sum sum = total[into + x];
                int spoilt = batch;  // once a sum is not finite, it stays so
                for (int b = 0; b < batch; ++b) {
                    const int flip = tiles[4 * b + 3];
                    const i64 slice = ((i64)b * heads + head) * pz + turned(z, pz, flip & FLIP_Z);
                    const i64 from = (slice * py + turned(y, py, flip & FLIP_Y)) * px;
                    put(sum, wide(sum) + wide(logits[from + turned((int)x, px, flip & FLIP_X)]) * here);
                    if (spoilt == batch && !finite(sum)) spoilt = b;
                }
                total[into + x] = sum;
                if (spoilt < batch) atomicMin(status, first_tile + spoilt);
            }
        }
    }
}

// shift: total (heads, depth, plane) in place
//
// shift_down(total, slices) of stitch/accumulate.py. One thread moves one column along z, from its front to its back,
// so that no voxel is overwritten before it is read; a column is never touched by two threads.
// Reads and writes every voxel once. The type only has the right size; nothing is converted.
template <typename Word>
__device__ void shift(Word *total, int heads, int depth, i64 plane, int slices) {
    const int keep = slices < depth ? depth - slices : 0;
    EACH(head, z, heads) EACH(once, y, 1) {
        EACH(voxel, x, plane) {
            Word *column = total + (i64)head * depth * plane + voxel;
            for (int z = 0; z < keep; ++z) column[z * plane] = column[(z + slices) * plane];
            for (int z = keep; z < depth; ++z) column[z * plane] = 0;
        }
    }
}

__device__ inline float between(float low, float high, float weight) { return low + weight * (high - low); }

// Where the eight old voxels of a new one lie, in elements from the first voxel of a head.
struct Corner {
    i64 row[4];  // (low z, low y), (low z, high y), (high z, low y), (high z, high y)
    int low, high;
    float z, y, x;
};

__device__ inline Corner corner_of(Tap z, Tap y, Tap x, int origin_z, i64 stride_z, i64 stride_y) {
    Corner corner;
    const i64 near = (i64)(z.low - origin_z) * stride_z, far = (i64)(z.high - origin_z) * stride_z;
    corner.row[0] = near + y.low * stride_y;
    corner.row[1] = near + y.high * stride_y;
    corner.row[2] = far + y.low * stride_y;
    corner.row[3] = far + y.high * stride_y;
    corner.low = x.low, corner.high = x.high;
    corner.z = z.weight, corner.y = y.weight, corner.x = x.weight;
    return corner;
}

// One head at a new voxel: along x, then y, then z, as volume/back/interpolate.py does it.
template <typename Logit>
__device__ inline float interpolated(const Logit *head, const Corner &at) {
    float row[4];
    for (int i = 0; i < 4; ++i)
        row[i] = between(wide(head[at.row[i] + at.low]), wide(head[at.row[i] + at.high]), at.x);
    return between(between(row[0], row[1], at.y), between(row[2], row[3], at.y), at.z);
}

// labels: logits (heads, z, y, x) with strides, x contiguous -> out (depth, height, width) with strides
//
// label_slab(...) of volume/back/interpolate.py: values[argmax over heads of the interpolated logits], the first of
// equals; with `regions` every head above 0 writes its value, later ones over earlier ones, and 0 is background.
// `logits` points at slice `origin_z`, row 0, column 0 of the network's grid. The taps are those of the new voxels that
// are written, `out` points at the first of them: any part of the image, in any order of axes.
// One thread per new voxel; reads eight logits per head, which are its neighbours', too (cache), and writes one label.
template <typename Logit, typename Label>
__device__ void labels(const Logit *logits, Label *out, const u16 *values, const Tap *z_taps, const Tap *y_taps,
                       const Tap *x_taps, int heads, int regions, int origin_z, i64 stride_head, i64 stride_z,
                       i64 stride_y, int depth, int height, int width, i64 out_z, i64 out_y, i64 out_x) {
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        const Corner corner = corner_of(z_taps[z], y_taps[y], x_taps[x], origin_z, stride_z, stride_y);
        int label = regions ? 0 : values[0];
        float best = regions ? 0.0f : interpolated(logits, corner);
        for (int head = regions ? 0 : 1; head < heads; ++head) {
            const float here = interpolated(logits + head * stride_head, corner);
            if (here > best) {
                label = values[head];
                if (!regions) best = here;
            }
        }
        out[z * out_z + y * out_y + x * out_x] = (Label)label;
    }
}

// probabilities: as `labels`, -> out (heads, depth, height, width) with strides
//
// probability_block(...) of volume/back/probabilities.py: softmax over the heads, exp(v - max) / sum, or with `regions`
// the sigmoid 1 / (1 + exp(-v)). Interpolates three times instead of keeping a value per head.
template <typename Logit, typename Out>
__device__ void probabilities(const Logit *logits, Out *out, const Tap *z_taps, const Tap *y_taps, const Tap *x_taps,
                              int heads, int regions, int origin_z, i64 stride_head, i64 stride_z, i64 stride_y,
                              int depth, int height, int width, i64 out_head, i64 out_z, i64 out_y, i64 out_x) {
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        const Corner corner = corner_of(z_taps[z], y_taps[y], x_taps[x], origin_z, stride_z, stride_y);
        Out *into = out + z * out_z + y * out_y + x * out_x;
        float best = interpolated(logits, corner), sum = 0.0f;
        for (int head = 1; head < heads && !regions; ++head) {
            const float here = interpolated(logits + head * stride_head, corner);
            best = here > best ? here : best;
        }
        for (int head = 0; head < heads && !regions; ++head)
            sum += expf(interpolated(logits + head * stride_head, corner) - best);
        for (int head = 0; head < heads; ++head) {
            const float here = interpolated(logits + head * stride_head, corner);
            put(into[head * out_head], regions ? 1.0f / (1.0f + expf(-here)) : expf(here - best) / sum);
        }
    }
}

#define GATHER(name, Out)                                                                                             \
    extern "C" __global__ void name(const float *image, Out *out, const int *tiles, int batch, int channels,         \
                                    int depth, int height, int width, int offset_z, int offset_y, int offset_x,      \
                                    int pz, int py, int px) {                                                        \
        gather(image, out, tiles, batch, channels, depth, height, width, offset_z, offset_y, offset_x, pz, py, px);  \
    }
GATHER(gather_f32, float)
GATHER(gather_f16, Half)

#define BLEND(name, Logit, Sum)                                                                                       \
    extern "C" __global__ void name(const Logit *logits, Sum *total, const float *wz, const float *wy,               \
                                    const float *wx, const int *tiles, int *status, int first_tile, int batch,       \
                                    int heads, int depth, int height, int width, int start_z, int start_y,           \
                                    int start_x, int pz, int py, int px) {                                           \
        blend(logits, total, wz, wy, wx, tiles, status, first_tile, batch, heads, depth, height, width, start_z,     \
              start_y, start_x, pz, py, px);                                                                         \
    }
BLEND(blend_f32_f32, float, float)
BLEND(blend_f16_f32, Half, float)
BLEND(blend_f32_f16, float, Half)
BLEND(blend_f16_f16, Half, Half)

#define SHIFT(name, Word)                                                                             \
    extern "C" __global__ void name(Word *total, int heads, int depth, i64 plane, int slices) {       \
        shift(total, heads, depth, plane, slices);                                                    \
    }
SHIFT(shift_f32, float)
SHIFT(shift_f16, u16)

#define LABELS(name, Logit, Label)                                                                                     \
    extern "C" __global__ void name(const Logit *logits, Label *out, const u16 *values, const Tap *z_taps,             \
                                    const Tap *y_taps, const Tap *x_taps, int heads, int regions, int origin_z,        \
                                    i64 stride_head, i64 stride_z, i64 stride_y, int depth, int height, int width,     \
                                    i64 out_z, i64 out_y, i64 out_x) {                                                 \
        labels(logits, out, values, z_taps, y_taps, x_taps, heads, regions, origin_z, stride_head, stride_z, stride_y, \
               depth, height, width, out_z, out_y, out_x);                                                             \
    }
LABELS(labels_f32_u8, float, u8)
LABELS(labels_f32_u16, float, u16)
LABELS(labels_f16_u8, Half, u8)
LABELS(labels_f16_u16, Half, u16)

#define PROBABILITIES(name, Logit, Out)                                                                                \
    extern "C" __global__ void name(const Logit *logits, Out *out, const Tap *z_taps, const Tap *y_taps,               \
                                    const Tap *x_taps, int heads, int regions, int origin_z, i64 stride_head,          \
                                    i64 stride_z, i64 stride_y, int depth, int height, int width, i64 out_head,        \
                                    i64 out_z, i64 out_y, i64 out_x) {                                                 \
        probabilities(logits, out, z_taps, y_taps, x_taps, heads, regions, origin_z, stride_head, stride_z, stride_y,  \
                      depth, height, width, out_head, out_z, out_y, out_x);                                            \
    }
PROBABILITIES(probabilities_f32_f32, float, float)
PROBABILITIES(probabilities_f32_f16, float, Half)
PROBABILITIES(probabilities_f16_f32, Half, float)
PROBABILITIES(probabilities_f16_f16, Half, Half)
