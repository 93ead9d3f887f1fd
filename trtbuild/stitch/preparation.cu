// What `volume/preparation` and `volume/resampling` define, on a GPU: from an image as read to what the network sees.
// Goes behind kernels.cu into one module, and keeps its rules. Volumes (depth, height, width) are in the network's
// order of axes; an image as read is walked with strides in elements, so that it is transposed and cropped on the way.

struct Volume {
    int depth, height, width;
    i64 z, y, x;  // strides
};

__device__ inline i64 place(const Volume &v, unsigned z, unsigned y, unsigned x) { return z * v.z + y * v.y + x * v.x; }

__device__ inline bool at_end(unsigned i, int n) { return i == 0 || (int)i == n - 1; }

enum Voxel { FOREGROUND = 0, HOLE = 1, OUTSIDE = 2 };

__device__ inline void lower(int *at, int value) {
    if (value < *at) atomicMin(at, value);  // a stale read only costs a useless atomic
}

// convert: array (channels, depth, height, width) of any type -> out, the same as float in C order
//
// array.astype(np.float32), for images that other programs hold on the device.
template <typename In>
__device__ inline void convert(const In *array, float *out, int channels, i64 stride_channel, const Volume &v) {
    const i64 voxels = (i64)v.depth * v.height * v.width;
    EACH(z, z, v.depth) EACH(y, y, v.height) EACH(x, x, v.width) {
        const i64 into = ((i64)z * v.height + y) * v.width + x;
        for (int c = 0; c < channels; ++c) out[c * voxels + into] = wide(array[c * stride_channel + place(v, z, y, x)]);
    }
}

#define CONVERT(name, In)                                                                                             \
    extern "C" __global__ void name(const In *array, float *out, int channels, i64 stride_channel, int depth,         \
                                    int height, int width, i64 stride_z, i64 stride_y, i64 stride_x) {                \
        const Volume v = {depth, height, width, stride_z, stride_y, stride_x};                                        \
        convert(array, out, channels, stride_channel, v);                                                             \
    }
CONVERT(convert_u8, u8)
CONVERT(convert_i8, signed char)
CONVERT(convert_u16, u16)
CONVERT(convert_i16, short)
CONVERT(convert_i32, int)
CONVERT(convert_f16, Half)

// not_finite: image -> first[0]: the smallest z with a voxel that is NaN or infinite
//
// np.isfinite, as checked_image(...) of volume/preparation/checks.py and normalized_channel(...) use it. INT_MAX before,
// and after it where every voxel is finite. Reads 4 bytes per voxel.
extern "C" __global__ void not_finite(const float *image, int *first, int depth, int height, int width, i64 stride_z,
                                      i64 stride_y, i64 stride_x) {
    const Volume v = {depth, height, width, stride_z, stride_y, stride_x};
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        if (!finite(image[place(v, z, y, x)])) lower(first, (int)z);
    }
}

// nonzero_box: image (channels, ...) -> box (6): smallest z, y, x and smallest -z, -y, -x of voxels that are not 0
//
// nonzero_box(data) of volume/preparation/crop.py; all six stay what they were where every voxel is 0.
// Reads 4 bytes per voxel and channel.
extern "C" __global__ void nonzero_box(const float *image, int *box, int channels, i64 stride_channel, int depth,
                                       int height, int width, i64 stride_z, i64 stride_y, i64 stride_x) {
    const Volume v = {depth, height, width, stride_z, stride_y, stride_x};
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        bool hit = false;
        for (int c = 0; c < channels; ++c) hit |= image[c * stride_channel + place(v, z, y, x)] != 0.0f;
        if (!hit) continue;
        const int ends[3] = {(int)z, (int)y, (int)x};
        for (int axis = 0; axis < 3; ++axis) {
            lower(box + axis, ends[axis]);
            lower(box + 3 + axis, -ends[axis]);
        }
    }
}

// background: image (channels, ...) cropped -> state (depth, height, width)
//
// FOREGROUND where any channel is not 0, OUTSIDE where none is and the voxel lies on a face, else HOLE, until `flood`
// has found it to be outside: with it filled_nonzero_mask(data) of volume/preparation/crop.py.
extern "C" __global__ void background(const float *image, u8 *state, int channels, i64 stride_channel, int depth,
                                      int height, int width, i64 stride_z, i64 stride_y, i64 stride_x) {
    const Volume v = {depth, height, width, stride_z, stride_y, stride_x};
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        bool hit = false;
        for (int c = 0; c < channels; ++c) hit |= image[c * stride_channel + place(v, z, y, x)] != 0.0f;
        const bool face = at_end(z, depth) || at_end(y, height) || at_end(x, width);
        state[((i64)z * height + y) * width + x] = hit ? FOREGROUND : face ? OUTSIDE : HOLE;
    }
}

// flood: state in place; a HOLE beside an OUTSIDE voxel of its line is OUTSIDE, too
//
// One thread walks one line forwards and backwards: `rows` lines of `columns` neighbours, `length` voxels `step` apart.
// Called for the three axes in turn until unchanged[0], 1 before, is still 1 after all of them: then the holes are
// those that binary_fill_holes of SciPy fills. No line is touched by two threads.
extern "C" __global__ void flood(u8 *state, int *unchanged, int rows, int columns, int length, i64 stride_row,
                                 i64 stride_column, i64 step) {
    EACH(row, y, rows) EACH(column, x, columns) {
        u8 *line = state + row * stride_row + column * stride_column;
        bool reached = false, changed = false;
        for (int turn = 0; turn < 2; ++turn) {
            for (int i = 0; i < length; ++i) {
                u8 &voxel = line[turned(i, length, turn) * step];
                if (voxel == HOLE && reached) voxel = OUTSIDE, changed = true;
                reached = voxel == OUTSIDE;
            }
        }
        if (changed) atomicMin(unchanged, 0);
    }
}

// column_sums: image -> sums (height, width) float64: of (v - centre)**power along z, where the mask is not OUTSIDE
//
// power 0 counts the voxels, 1 is for the mean, 2 for the deviation; mask (depth, height, width) or null. With `fold`
// what z-score needs (volume/preparation/normalize.py), in float64, in an order that the launch does not change.
extern "C" __global__ void column_sums(const float *image, const u8 *mask, double *sums, double centre, int power,
                                       int depth, int height, int width, i64 stride_z, i64 stride_y, i64 stride_x) {
    const Volume v = {depth, height, width, stride_z, stride_y, stride_x};
    EACH(once, z, 1) EACH(y, y, height) EACH(x, x, width) {
        double sum = 0.0;
        for (int z = 0; z < depth; ++z) {
            if (mask && mask[((i64)z * height + y) * width + x] == OUTSIDE) continue;
            const double value = image[place(v, z, y, x)] - centre;
            sum += power == 0 ? 1.0 : power == 1 ? value : value * value;
        }
        sums[(i64)y * width + x] = sum;
    }
}

// fold: values (n) -> sums (m): sums[i] = values[i] + values[i + m] + values[i + 2 m] + ...
extern "C" __global__ void fold(const double *values, double *sums, i64 n, int m) {
    EACH(once, y, 1) EACH(same, z, 1) EACH(i, x, m) {
        double sum = 0.0;
        for (i64 at = i; at < n; at += m) sum += values[at];
        sums[i] = sum;
    }
}

// Integers in the order of floats (no NaN), so that their minimum is one atomic; the inverse is itself.
__device__ inline int key_of(int bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
__device__ inline float float_of(int key) {
    union { int bits; float value; } both;
    both.bits = key_of(key);
    return both.value;
}
__device__ inline int key_of(float value) {
    union { int bits; float value; } both;
    both.value = value;
    return key_of(both.bits);
}

// The slice along `axis` that a voxel belongs to; 0 for all where the axis is negative.
__device__ inline unsigned group_of(int axis, unsigned z, unsigned y, unsigned x) {
    return axis < 0 ? 0 : axis == 0 ? z : axis == 1 ? y : x;
}

// extremes: image -> keys (groups, 2): of the smallest value, and the complement of that of the largest one
//
// The range that clip_to_range of volume/resampling/axis.py clips to, of all voxels or of every slice along an axis.
// Both are INT_MAX before.
extern "C" __global__ void extremes(const float *image, int *keys, int axis, int depth, int height, int width,
                                    i64 stride_z, i64 stride_y, i64 stride_x) {
    const Volume v = {depth, height, width, stride_z, stride_y, stride_x};
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        const int key = key_of(image[place(v, z, y, x)]);
        int *group = keys + 2 * group_of(axis, z, y, x);
        lower(group, key);
        lower(group + 1, ~key);
    }
}

// clip: volume in place, to the ranges of `extremes`
extern "C" __global__ void clip(float *volume, const int *keys, int axis, int depth, int height, int width) {
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        const int *group = keys + 2 * group_of(axis, z, y, x);
        const float low = float_of(group[0]), high = float_of(~group[1]);
        float &value = volume[((i64)z * height + y) * width + x];
        value = value < low ? low : value > high ? high : value;
    }
}

// normalize: image -> out (depth, height, width): (clip(v, low, high) - shift) / scale, v where the mask is OUTSIDE
//
// normalized_channel(...) of volume/preparation/normalize.py in float32: every scheme is this with other constants.
// Reads 4 (5 with a mask) and writes 4 bytes per voxel.
extern "C" __global__ void normalize(const float *image, const u8 *mask, float *out, float low, float high, float shift,
                                     float scale, int depth, int height, int width, i64 stride_z, i64 stride_y,
                                     i64 stride_x) {
    const Volume v = {depth, height, width, stride_z, stride_y, stride_x};
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        const i64 into = ((i64)z * height + y) * width + x;
        const float value = image[place(v, z, y, x)];
        const float clipped = value < low ? low : value > high ? high : value;
        out[into] = mask && mask[into] == OUTSIDE ? value : (clipped - shift) / scale;
    }
}

// resize: volume -> out (depth, height, width), which differs from it along `axis` only, where it has `old` voxels
//
// out = matrix @ volume along the axis, as resize_axis(...) of volume/resampling/axis.py does it, with the matrix of a
// spline (prefilter included), of torch's interpolation, or of the nearest voxel. Row i of the matrix is 0 but for
// entries (band, new)[:, i] from column starts[i] on. Reads `band` neighbours (cache) and writes 4 bytes per voxel.
extern "C" __global__ void resize(const float *volume, float *out, const int *starts, const float *entries, int band,
                                  int axis, int old, int depth, int height, int width) {
    const i64 row = axis == 2 ? old : width, slice = (axis == 1 ? old : height) * row;
    const i64 step = axis == 0 ? slice : axis == 1 ? row : 1;
    const int rows = axis == 0 ? depth : axis == 1 ? height : width;
    EACH(z, z, depth) EACH(y, y, height) EACH(x, x, width) {
        const unsigned i = group_of(axis, z, y, x);
        const i64 line = (axis == 0 ? 0 : z * slice) + (axis == 1 ? 0 : y * row) + (axis == 2 ? 0 : x);
        const i64 from = line + starts[i] * step;
        float sum = 0.0f;
        for (int k = 0; k < band; ++k) sum += entries[(i64)k * rows + i] * volume[from + k * step];
        out[((i64)z * height + y) * width + x] = sum;
    }
}
