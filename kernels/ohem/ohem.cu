// Bilinear upsampling + cross entropy + online hard example mining, without the full-size logits. See ../README.md.
//
// Compiled at run time for one type of logits, one type of labels and, up to 32, one number of classes:
//   OHEM_LOGIT    float | half | bfloat16
//   OHEM_LABEL    uint8 | int64
//   OHEM_CLASSES  the number of classes, or 0 for any number, taken CHUNK at a time
//   OHEM_OFFSET   int | int64, for the distance of two logits or two pixels of an image
// tests/test_kernel.py compiles the same source for the CPU, with what CUDA brings given by tests/cuda_shim.h.
//
// A thread owns one full-size column and walks down it. Between two rows of logits the scores of a pixel are a straight
// line through two vectors that stay in registers.

#ifndef OHEM_LOGIT
#define OHEM_LOGIT float
#define OHEM_LABEL uint8
#define OHEM_CLASSES 19
#define OHEM_OFFSET int
#endif

typedef unsigned char uint8;
typedef long long int64;
typedef unsigned long long uint64;
struct half { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

typedef OHEM_LOGIT Logit;
typedef OHEM_LABEL Label;
typedef OHEM_OFFSET Offset;

constexpr int CHUNK = 16;           // classes at a time when their number is not known
constexpr int K = OHEM_CLASSES > 0 ? OHEM_CLASSES : CHUNK;
constexpr int BLOCK = K > 20 ? 64 : 128;  // most threads in a block: shared memory grows with classes and threads
constexpr int PIXEL_ROWS = 32;      // most rows of pixels in a tile of the forward pass
constexpr int LOGIT_ROWS = 63;      // most rows of logits in a tile of the backward pass: with one more, bits of an integer
constexpr int LEVELS = 3;           // a loss is found by its highest 11, then 10, then 10 bits
constexpr int BINS = 2048;
constexpr int IGNORE = 255;         // label of the pixels that do not count
constexpr float IGNORED = -1.0f;    // in the loss map; a loss is never negative
constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.693147181f;
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)
#define INFINITE __uint_as_float(0x7f800000u)

// ---------------------------------------------------------------------------------------------------- conversions

#ifndef OHEM_ON_CPU
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float to_float(half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ void store(half* to, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
#endif
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(bfloat16* to, float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    to->bits = (unsigned short)(x != x ? 0x7fc0u : rounded >> 16);
}

// ------------------------------------------------------------------------------------------------------- geometry

// One axis of the upsampling, as torch.nn.functional.interpolate has it: `scale` is source pixels per full-size pixel.
struct Axis {
    int size, full;
    float scale;
    bool align;

    __device__ __forceinline__ float source(float pixel) const {
        return fmaxf(fmaf(scale, pixel + (align ? 0.0f : 0.5f), align ? 0.0f : -0.5f), 0.0f);
    }
    __device__ __forceinline__ int cell(int pixel) const { return min(int(source(float(pixel))), size - 1); }
    // Weight of the neighbour after `cell`; the last cell has none.
    __device__ __forceinline__ float fraction(int pixel, int cell) const {
        return cell + 1 < size ? source(float(pixel)) - float(cell) : 0.0f;
    }
    __device__ __forceinline__ bool has_next(int cell) const { return cell + 1 < size && size != full; }
    // The first pixel whose cell is `wanted` or a later one. Pixels of a cell are neighbours: `cell` never decreases.
    __device__ int first(int wanted) const {
        if (wanted <= 0) return 0;
        if (wanted >= size || scale <= 0.0f) return full;
        const float guess = align ? float(wanted) / scale : (float(wanted) + 0.5f) / scale - 0.5f;
        int pixel = int(fminf(guess, float(full)));
        while (pixel > 0 && cell(pixel - 1) >= wanted) --pixel;
        while (pixel < full && cell(pixel) < wanted) ++pixel;
        return pixel;
    }
};

// The tile of a block: `rows` x `columns` of the `height` x `width` pixels or logits of an image.
struct Tile {
    int64 image;
    int first_y, first_x;
    __device__ __forceinline__ Tile(unsigned block, int64 rows, int64 columns, int64 height, int64 width) {
        const unsigned across = unsigned((width + columns - 1) / columns), down = unsigned((height + rows - 1) / rows);
        image = block / across / down;
        first_y = int(block / across % down) * int(rows);
        first_x = int(block % across) * int(columns);
    }
};

// A largest score as what others are less by: -infinity less itself would be NaN.
__device__ __forceinline__ float finite(float x) { return x == -INFINITE ? 0.0f : x; }

// What both passes begin with: the logits (N, C, h, w) with their strides, and the labels (N, full_h, full_w).
#define GEOMETRY                                                                                                     \
    const Logit *__restrict__ logits, const Label *__restrict__ target, int64 image_stride, int64 class_stride,      \
        int64 row_stride, int64 pixel_stride, int64 images, int64 classes, int64 h, int64 w, int64 full_h,           \
        int64 full_w, float scale_y, float scale_x, int64 align

// ------------------------------------------------------------------------------------------------------ selection

// What the kernels of one call tell each other. All zero at the start.
struct State {
    uint64 valid, hard, n_min, asked;  // pixels; n_min: of the `asked` ones, those that exist
    uint64 above;                      // pixels known to be above the cut
    double total;                      // sum of their losses
    unsigned nan, ticket[1 + LEVELS], refine, prefix, kept_only;
    uint64 histogram[LEVELS][BINS];
};
static_assert(sizeof(State) == 8 * (10 + LEVELS * BINS), "bisenet/kernel.py allocates it");

// What the backward pass needs: a pixel above `cut` weighs 1, one at it `share`; the sum is multiplied by `scale`.
struct Selection {
    float cut, share, scale;
};

// The pixels above some loss: how many, and the sum of their losses.
struct Tail {
    uint64 count;
    double sum;
    __device__ void add(uint64 pixels, float each) {
        count += pixels;
        if (pixels) sum += double(pixels) * double(each);
    }
};

// True in the block that ends last: it sees what all others wrote.
__device__ bool is_last_block(unsigned* ticket) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// Sum over the block, in thread 0. The order of additions depends on the size of the block alone.
template <class T>
__device__ T block_sum(T value) {
    __shared__ T partial[BLOCK];
    __syncthreads();
    partial[threadIdx.x] = value;
    int count = blockDim.x;
    while (count > 1) {
        const int half_count = (count + 1) / 2;
        __syncthreads();
        if (int(threadIdx.x) < count - half_count) partial[threadIdx.x] += partial[threadIdx.x + half_count];
        count = half_count;
    }
    return threadIdx.x == 0 ? partial[0] : T();  // the others would read while it is being written
}

// Sum of one number per block, in thread 0 of the last block, in a fixed order.
__device__ double sum_of_slots(const double* slots) {
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x)
        sum += ((const volatile double*)slots)[i];
    return block_sum(sum);
}

__device__ void finish(const State* state, double total, uint64 kept, Selection* selection, float* loss, int64* n_kept) {
    uint64 divisor = state->kept_only || kept > state->asked ? kept : state->asked;
    if (divisor == 0) divisor = 1;
    *loss = state->nan ? NOT_A_NUMBER : float(total / double(divisor));
    selection->scale = state->nan ? NOT_A_NUMBER : float(1.0 / double(divisor));
    *n_kept = int64(kept);
}

// The rule: a pixel is hard above `hard_loss`. n_min is valid * numerator / denominator, or numerator where that is 0.
#define RULE float hard_loss, int64 numerator, int64 denominator, int64 kept_only
#define RESULTS State *state, double *slots, Selection *selection, float *loss, int64 *n_kept

// End of the forward pass: the sums of all threads and, in the block that ends last, of all blocks; and the selection
// where enough pixels are hard.
__device__ void conclude(float sum, unsigned hard, unsigned valid, bool nan, RULE, RESULTS) {
    const double sum_here = block_sum(double(sum));
    const uint64 counts = block_sum(uint64(hard) << 32 | valid);
    const int nan_here = __syncthreads_or(nan || sum != sum);
    if (threadIdx.x == 0) {
        slots[blockIdx.x] = sum_here;
        atomicAdd(&state->hard, counts >> 32);
        atomicAdd(&state->valid, counts & 0xffffffffu);
        if (nan_here) atomicOr(&state->nan, 1u);
    }
    if (!is_last_block(&state->ticket[0])) return;
    const double total = sum_of_slots(slots);
    if (threadIdx.x > 0) return;
    const uint64 all_valid = atomicAdd(&state->valid, uint64(0)), all_hard = atomicAdd(&state->hard, uint64(0));
    state->nan = atomicOr(&state->nan, 0u);
    state->asked = uint64(denominator ? int64(all_valid) * numerator / denominator : numerator);
    state->n_min = state->asked < all_valid ? state->asked : all_valid;
    state->kept_only = unsigned(kept_only);
    state->refine = !state->nan && all_hard < state->n_min;
    selection->cut = hard_loss;
    selection->share = 0.0f;
    finish(state, total, all_hard, selection, loss, n_kept);
}

// Whether there is a NaN in any of the logits. The blocks share the work.
__device__ bool any_nan(const Logit* logits, int64 image_stride, int64 class_stride, int64 row_stride, int64 pixel_stride,
                        int64 images, int64 classes, int64 h, int64 w) {
    bool nan = false;
    const int64 count = images * classes * h * w;
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64(gridDim.x) * blockDim.x) {
        const int64 offset = i % w * pixel_stride + i / w % h * row_stride + i / w / h % classes * class_stride +
                             i / w / h / classes * image_stride;
        const float value = to_float(logits[offset]);
        nan |= value != value;
    }
    return nan;
}
// Where too few pixels are hard: find the n_min-th largest loss, `level` 0, 1, 2 after one another. The bits of a
// positive float, read as an integer, have the order of the floats.
extern "C" __global__ void __launch_bounds__(BLOCK) ohem_refine(
    const float* __restrict__ losses, int64 pixels, int64 level, RESULTS) {
    if (!state->refine) return;
    __shared__ unsigned counts[BINS];
    __shared__ uint64 histogram[BINS];
    __shared__ Tail suffix[BLOCK + 1];
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        counts[i] = 0;
    __syncthreads();

    const int shift = level == 0 ? 20 : level == 1 ? 10 : 0;
    const unsigned mask = level == 0 ? 2047u : 1023u;
    const unsigned prefix = state->prefix;
    double sum = 0.0;
    unsigned run_bin = 0, run = 0;  // equal neighbours are counted together: most losses of a trained network are 0
    const auto count = [&](float value) {
        if (value < 0.0f) return;
        const unsigned bits = __float_as_uint(value);
        const unsigned high = level == 0 ? 0u : bits >> (shift + 10);
        if (high == prefix) {
            const unsigned bin = bits >> shift & mask;
            if (bin != run_bin) {
                if (run) atomicAdd(&counts[run_bin], run);
                run_bin = bin;
                run = 0;
            }
            ++run;
        } else if (high > prefix && (level == 1 || high >> 10 == prefix >> 10)) {
            sum += double(value);  // above the bin found before, and not summed before
        }
    };
    const int64 first = int64(blockIdx.x) * blockDim.x + threadIdx.x, step = int64(gridDim.x) * blockDim.x;
#pragma unroll 2
    for (int64 i = first; i < pixels / 4; i += step) {  // the map is aligned, as PyTorch allocates it
        const float4 four = ((const float4*)losses)[i];
        count(four.x);
        count(four.y);
        count(four.z);
        count(four.w);
    }
    for (int64 i = pixels / 4 * 4 + first; i < pixels; i += step)
        count(losses[i]);
    if (run) atomicAdd(&counts[run_bin], run);
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        if (counts[i]) atomicAdd(&state->histogram[level][i], uint64(counts[i]));
    sum = block_sum(sum);
    if (threadIdx.x == 0) slots[blockIdx.x] = sum;
    if (!is_last_block(&state->ticket[1 + level])) return;

    // The bin with the n_min-th largest: each thread counts some bins, then how many pixels are in bins above its own.
    // At the last level a bin is one number, so that counting also sums.
    const double sum_above_bin = sum_of_slots(slots);
    if (threadIdx.x == 0) suffix[blockDim.x] = {state->above, state->total + (level ? sum_above_bin : 0.0)};
    const volatile uint64* all = state->histogram[level];
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        histogram[i] = all[i];
    __syncthreads();
    const bool exact = level == LEVELS - 1;
    const int bins = (BINS + blockDim.x - 1) / blockDim.x;
    const int low = min(int(threadIdx.x) * bins, BINS), high = min(low + bins, BINS);
    Tail own = {0, 0.0};
    for (int i = high - 1; i >= low; --i)
        own.add(histogram[i], exact ? __uint_as_float(prefix << 10 | unsigned(i)) : 0.0f);
    suffix[threadIdx.x] = own;
    for (unsigned step = 1; step < blockDim.x; step *= 2) {
        __syncthreads();
        const Tail other = threadIdx.x + step < blockDim.x ? suffix[threadIdx.x + step] : Tail{0, 0.0};
        __syncthreads();
        suffix[threadIdx.x].count += other.count;
        suffix[threadIdx.x].sum += other.sum;
    }
    __syncthreads();
    Tail above = suffix[blockDim.x];
    if (threadIdx.x + 1 < blockDim.x) {
        above.count += suffix[threadIdx.x + 1].count;
        above.sum += suffix[threadIdx.x + 1].sum;
    }
    const uint64 wanted = state->n_min;
    if (above.count >= wanted || above.count + own.count < wanted) return;  // exactly one thread goes on

    int bin = high - 1;
    for (; above.count + histogram[bin] < wanted; --bin)
        above.add(histogram[bin], exact ? __uint_as_float(prefix << 10 | unsigned(bin)) : 0.0f);
    const unsigned found = prefix << 10 | unsigned(bin);
    state->above = above.count;
    state->total = above.sum;
    state->prefix = found;
    if (!exact) return;
    const float cut = __uint_as_float(found);
    const uint64 at_cut = wanted - above.count;
    selection->cut = cut;
    selection->share = float(double(at_cut) / double(histogram[bin]));
    finish(state, above.sum + double(at_cut) * double(cut), wanted, selection, loss, n_kept);
}

#if OHEM_CLASSES > 0
// ------------------------------------------------------------------- a number of classes that is known: staged rows
// Rows of logits are staged in shared memory, less the largest class of their own pixel, so that every interpolated score
// is at most 0. Scores are in units of log 2, since the weights of the interpolation contain log2(e).

constexpr int QUADS = (K + 3) / 4 | 1;      // an odd number of 16-byte words: no bank conflicts between neighbours
constexpr int PAD = 4 * QUADS;
constexpr int COLUMNS = BLOCK / 2 + 4;      // most columns of logits beside the pixels of a block, and one of zeros
typedef float StagedRow[COLUMNS][PAD];

__device__ __forceinline__ float4& quad(float* x, int i) { return ((float4*)x)[i]; }

__device__ __forceinline__ void clear(float (&x)[PAD]) {
#pragma unroll
    for (int j = 0; j < QUADS; ++j)
        quad(x, j) = {0.0f, 0.0f, 0.0f, 0.0f};
}

// Stage `columns` logits of a row from `origin`; the last ones may not exist.
__device__ __forceinline__ void stage(
    StagedRow& to, const Logit* origin, int64 class_stride, int64 pixel_stride, int columns, int last) {
    const Offset step = Offset(class_stride);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        const Logit* logit = origin + min(i, last) * Offset(pixel_stride);
        float value[PAD], highest = -INFINITE;
#pragma unroll
        for (int k = 0; k < PAD; ++k) {
            value[k] = 0.0f;
            if (k >= K) continue;
            value[k] = to_float(*logit);
            logit += step;
            highest = fmaxf(highest, value[k]);
        }
        highest = finite(highest);
#pragma unroll
        for (int k = 0; k < K; ++k)
            value[k] -= highest;
#pragma unroll
        for (int j = 0; j < QUADS; ++j)
            quad(to[i], j) = {value[4 * j], value[4 * j + 1], value[4 * j + 2], value[4 * j + 3]};
    }
}

// A thread's column of pixels between two staged columns.
struct Between {
    int left, right;
    float fraction, left_weight, right_weight;
    // `first` of the staged columns is at 0, and zeros are at `zeros`.
    __device__ __forceinline__ Between(const Axis& axis, int pixel, int first, int zeros) {
        const int cell = axis.cell(pixel);
        left = cell - first;
        right = axis.has_next(cell) ? left + 1 : zeros;
        fraction = axis.fraction(pixel, cell);
        left_weight = (1.0f - fraction) * LOG2_E;
        right_weight = fraction * LOG2_E;
    }
    // Of one class, in a row that begins with the column on the left.
    __device__ __forceinline__ float score(const float* row) const {
        return fmaf(row[(right - left) * PAD], right_weight, row[0] * left_weight);
    }
    // Between two rows; at fraction 0 the row below, which may be infinite too, has no part in it.
    __device__ __forceinline__ float score(const float* above, int to_below, float fraction) const {
        const float top = score(above), bottom = score(above + to_below);
        return fraction > 0.0f ? fmaf(bottom - top, fraction, top) : top;
    }
    // Of all classes in a row, less others.
    __device__ __forceinline__ void scores(StagedRow& row, const float (&less)[K], float (&to)[K]) const {
#pragma unroll
        for (int j = 0; j < QUADS; ++j) {
            const float4 a = quad(row[left], j), b = quad(row[right], j);
            const float lefts[4] = {a.x, a.y, a.z, a.w}, rights[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (4 * j + k < K)
                    to[4 * j + k] = fmaf(rights[k], right_weight, fmaf(lefts[k], left_weight, -less[4 * j + k]));
        }
    }
};

// Scores in a column between two rows.
struct Line {
    float top[K], slope[K];
    __device__ __forceinline__ float at(int k, float fraction) const { return fmaf(slope[k], fraction, top[k]); }
    // `carry`: the row above is the one that was below.
    __device__ __forceinline__ void load(const Between& between, StagedRow& above, StagedRow& below, bool has_bottom, bool carry) {
        const float nothing[K] = {};
        if (!carry) {
            between.scores(above, nothing, top);
#pragma unroll
            for (int k = 0; k < K; ++k)
                slope[k] = 0.0f;
        }
#pragma unroll
        for (int k = 0; k < K; ++k)
            top[k] += slope[k];
        if (has_bottom) {
            between.scores(below, top, slope);
        } else {
            asm volatile("");  // else the zeros are written in any case, and mostly overwritten
#pragma unroll
            for (int k = 0; k < K; ++k)
                slope[k] = 0.0f;
        }
    }
};
struct __align__(8) PixelRow {
    int cell;
    float fraction;
};

// Loss map (IGNORED where the label is IGNORE, NaN where it is unknown), and the selection where enough is hard. A block
// owns `tile_columns` columns and `tile_rows` rows of pixels, so few that COLUMNS columns of logits are beside them.
extern "C" __global__ void __launch_bounds__(BLOCK, K > 20 ? 6 : 4) ohem_forward(
    GEOMETRY, RULE, int64 tile_rows, int64 tile_columns, float* __restrict__ losses, RESULTS) {
    const Axis vertical = {int(h), int(full_h), scale_y, align != 0};
    const Axis horizontal = {int(w), int(full_w), scale_x, align != 0};
    const Tile tile(blockIdx.x, tile_rows, tile_columns, full_h, full_w);
    const int64 image = tile.image;

    __shared__ __align__(16) StagedRow staged[3];
    __shared__ PixelRow pixel_rows[PIXEL_ROWS + 1];

    const int first_x = tile.first_x, last_x = min(first_x + int(tile_columns), int(full_w)) - 1;
    const int x = first_x + int(threadIdx.x);
    const bool inside = x <= last_x;
    const int pixel = min(x, last_x);
    const int first_column = horizontal.cell(first_x), last_column = int(w) - 1 - first_column;
    const int columns = horizontal.cell(last_x) + 2 - first_column;
    const Between between(horizontal, pixel, first_column, columns);

    const int begin = tile.first_y;
    const int rows = min(int(tile_rows), int(full_h) - begin);
    for (int i = threadIdx.x; i <= rows; i += blockDim.x) {
        const int cell = vertical.cell(begin + i);
        pixel_rows[i] = i < rows ? PixelRow{cell, vertical.fraction(begin + i, cell)} : PixelRow{-1, 0.0f};
    }
    for (int i = threadIdx.x; i < PAD; i += blockDim.x)
        staged[0][columns][i] = staged[1][columns][i] = staged[2][columns][i] = 0.0f;
    const int first_cell = vertical.cell(begin), last_cell = vertical.cell(begin + rows - 1), last_row = int(h) - 1;
    const Logit* origin = logits + image * image_stride + first_column * pixel_stride;
    stage(staged[0], origin + first_cell * row_stride, class_stride, pixel_stride, columns, last_column);
    stage(staged[1], origin + min(first_cell + 1, last_row) * row_stride, class_stride, pixel_stride, columns, last_column);
    __syncthreads();

    float sum = 0.0f;  // of at most PIXEL_ROWS losses
    unsigned hard = 0, valid = 0;
    float nan = 0.0f;
    Line line;
    const int64 first_pixel = (image * full_h + begin) * full_w + pixel;
    const Label* label_here = target + first_pixel;
    float* loss_here = losses + first_pixel;
    int above = 0, below = 1, next = 2;
    bool carry = false;
    const PixelRow* row = pixel_rows;
    const int width = int(full_w);
    for (int cell = first_cell; cell <= last_cell; ++cell) {
        if (cell < last_cell)
            stage(staged[next], origin + min(cell + 2, last_row) * row_stride, class_stride, pixel_stride, columns, last_column);
        const bool has_bottom = vertical.has_next(cell);
        line.load(between, staged[above], staged[below], has_bottom, carry);
        carry = has_bottom;
        const float* const top = staged[above][between.left];
        const int to_below = (below - above) * COLUMNS * PAD;
        for (; row->cell == cell; ++row, label_here += width, loss_here += width) {
            const Label label = *label_here;
            const float fraction = row->fraction;
            float sums[2] = {0.0f, 0.0f};  // two, since an addition waits for the one before
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float exponential = fast_exp2(line.at(k, fraction));
                sums[k % 2] = k < 2 ? exponential : sums[k % 2] + exponential;
            }
            float exponentials = sums[0] + sums[1], highest = 0.0f;
            if (exponentials < 1e-18f) {  // all are far below, between pixels with different largest classes
                highest = -INFINITE;
#pragma unroll
                for (int k = 0; k < K; ++k)
                    highest = fmaxf(highest, line.at(k, fraction));
                highest = finite(highest);
                exponentials = 0.0f;
#pragma unroll
                for (int k = 0; k < K; ++k)
                    exponentials += fast_exp2(line.at(k, fraction) - highest);
            }
            nan = fmaf(exponentials, 0.0f, nan);
            const bool known = label >= 0 && label < K;  // without branches: few pixels would take them
            const float own = between.score(top + (known ? int(label) : 0), to_below, fraction);
            float value = LN_2 * ((highest - own) + fast_log2(exponentials));
            if (value <= 0.0f) value = 0.0f;  // rounding; a NaN passes
            if (!known) value = label == IGNORE ? IGNORED : NOT_A_NUMBER;
            const bool is_hard = !(value <= hard_loss);  // IGNORED is not, a NaN is
            sum += is_hard ? value : 0.0f;
            hard += is_hard;
            valid += label != IGNORE;
            if (inside) *loss_here = value;
        }
        __syncthreads();
        const int free = above;
        above = below;
        below = next;
        next = free;
    }
    if (!inside) sum = 0.0f, hard = valid = 0;
    if (full_h < h || full_w < w)  // not every logit is next to a pixel
        if (any_nan(logits, image_stride, class_stride, row_stride, pixel_stride, images, classes, h, w)) nan = NOT_A_NUMBER;
    conclude(sum, hard, valid, nan != nan, hard_loss, numerator, denominator, kept_only, state, slots, selection, loss,
             n_kept);
}

constexpr int PLACES = BLOCK + COLUMNS;  // the place of a pixel is its thread plus its cell, which avoids bank conflicts

// Add up 4 N classes from class 4 `j` of the pixels beside column `q` of a row of logits, and write them. Bits of `part`:
// 1 not the first, 2 not the last of the blocks full of pixels that belong to one logit, 4 the last of them.
template <int N>
__device__ __forceinline__ void gather(
    const float (*gathered)[PAD], const float* fractions, const int* starts, bool some, int q, int j, Logit* row_out,
    int64 pixel_stride, int64 class_stride, float scale, float* sums, int part) {
    float sum[4 * N];
#pragma unroll
    for (int i = 0; i < 4 * N; ++i)
        sum[i] = 0.0f;
    const int middle = starts[q + 1] + q, last = some ? starts[q + 2] + q : -1;
#pragma unroll 1
    for (int p = starts[q] + q; p <= last; ++p) {  // the place in the middle is nobody's and holds zeros
        const float fraction = fractions[p], weight = p < middle ? fraction : 1.0f - fraction;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float4 one = ((const float4*)gathered[p])[j + i];
            sum[4 * i] = fmaf(weight, one.x, sum[4 * i]);
            sum[4 * i + 1] = fmaf(weight, one.y, sum[4 * i + 1]);
            sum[4 * i + 2] = fmaf(weight, one.z, sum[4 * i + 2]);
            sum[4 * i + 3] = fmaf(weight, one.w, sum[4 * i + 3]);
        }
    }
    if (part) {
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
            if (4 * j + i >= K) continue;
            if (part & 1) sum[i] += sums[4 * j + i];
            sums[4 * j + i] = sum[i];
        }
        if (part & 2) return;
    }
    Logit* out = row_out + (q * pixel_stride + 4 * j * class_stride);
    const Offset step = Offset(class_stride);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i)
        if (4 * j + i < K) {
            store(out, sum[i] * scale);
            out += step;
        }
}

// Gradient of the logits, each element written once by the block that owns it: `tile_rows` x `tile_columns` logits of
// one image. The block walks the pixels next to its logits; those on its border are seen by two blocks. A thread gathers
// its column over the rows of a cell; then the columns are gathered through shared memory. If the pixels next to one
// column of logits are more than the block has threads, tile_rows and tile_columns are 1.
extern "C" __global__ void __launch_bounds__(BLOCK, K > 20 ? 4 : 3) ohem_backward(
    GEOMETRY, const float* __restrict__ losses, const Selection* __restrict__ selection,
    const float* __restrict__ upstream, int64 tile_rows, int64 tile_columns, Logit* __restrict__ gradient,
    int64 image_stride_out, int64 class_stride_out, int64 row_stride_out, int64 pixel_stride_out) {
    __shared__ __align__(16) StagedRow staged[2];         // rows of logits, even and odd
    __shared__ __align__(16) float gathered[2][PLACES][PAD];  // gradients of columns of pixels for even and odd rows of logits
    __shared__ float fractions[PLACES], sums[K];
    __shared__ int starts[COLUMNS + 1], row_starts[LOGIT_ROWS + 2];
    __shared__ unsigned kept[2];  // cells with a pixel that is kept, as bits from first_y - 1

    const Axis vertical = {int(h), int(full_h), scale_y, align != 0};
    const Axis horizontal = {int(w), int(full_w), scale_x, align != 0};
    const Tile tile(blockIdx.x, tile_rows, tile_columns, h, w);
    const int first_x = tile.first_x, first_y = tile.first_y;
    const int64 image = tile.image;
    const int columns = min(int(tile_columns), int(w) - first_x);
    const int last_y = min(first_y + int(tile_rows), int(h)) - 1;
    const int first_column = max(first_x - 1, 0), last_column = int(w) - 1 - first_column;
    const int near_columns = first_x + columns + 1 - first_column;
    const Logit* origin = logits + image * image_stride + first_column * pixel_stride;

    const float* const losses_here = losses + image * full_h * full_w;
    const Label* const target_here = target + image * full_h * full_w;
    const Offset width = Offset(full_w);

    const float cut = selection->cut, share = selection->share;
    const float scale = selection->scale * *upstream;
    const bool spread = columns * QUADS <= 2 * 32;  // else one thread for all classes needs fewer instructions

    for (int i = threadIdx.x; i <= last_y + 2 - first_y; i += blockDim.x)
        row_starts[i] = vertical.first(first_y - 1 + i);
    for (int i = threadIdx.x; i < PAD; i += blockDim.x)
        staged[0][near_columns][i] = staged[1][near_columns][i] = 0.0f;
    const int begin = horizontal.first(first_x - 1), end = horizontal.first(first_x + columns);
    for (int base = begin; base < end || base == begin; base += blockDim.x) {
        const int x = base + threadIdx.x;
        const bool inside = x < end;
        const int pixel = min(x, int(full_w) - 1);
        const Between between(horizontal, pixel, first_column, near_columns);

        __syncthreads();
        // Threads outside have places of their own, which hold zeros.
        const int place = threadIdx.x + min(between.left + first_column - (first_x - 1), columns + 1);
        for (int i = threadIdx.x; i < 2 * PLACES * QUADS; i += blockDim.x)
            quad(&gathered[0][0][0], i) = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int i = threadIdx.x; i < PLACES; i += blockDim.x)
            fractions[i] = 0.0f;
        __syncthreads();
        fractions[place] = between.fraction;
        for (int i = threadIdx.x; i < columns + 2; i += blockDim.x) {
            const int start = horizontal.first(first_x - 1 + i) - base;
            starts[i] = max(0, min(start, min(int(blockDim.x), end - base)));
        }
        for (int i = threadIdx.x; i < 2; i += blockDim.x)
            kept[i] = 0;
        __syncthreads();

        // Which cells have something to do, in this column and in the block.
        uint64 mine = 0;
        if (inside) {
            int bit = first_y > 0 ? 0 : 1;
            const int last_bit = last_y - first_y + 1, end_y = row_starts[last_bit + 1];
            Offset at = Offset(row_starts[bit]) * width + pixel;
            for (int y = row_starts[bit]; y < end_y; y += 32) {
                unsigned rows = 0;  // a bit for each of 32 rows of pixels, the first one on the left
                const int count = min(32, end_y - y);
#pragma unroll 8
                for (int i = 0; i < count; ++i, at += width)
                    rows |= losses_here[at] >= cut ? 0x80000000u >> i : 0u;
                for (; bit <= last_bit; ++bit) {
                    const int from = max(row_starts[bit] - y, 0), to = row_starts[bit + 1] - y;
                    if (to > from && rows << from >> (32 - (min(to, 32) - from))) mine |= uint64(1) << bit;
                    if (to >= 32) break;
                }
            }
        }
        if (unsigned(mine)) atomicOr(&kept[0], unsigned(mine));
        if (unsigned(mine >> 32)) atomicOr(&kept[1], unsigned(mine >> 32));
        __syncthreads();
        const uint64 all = uint64(kept[1]) << 32 | kept[0];

        float row_above[K] = {}, row_below[K] = {};  // sums for the rows of logits above and below the cell
        Line line;
        bool carry = false;
        StagedRow *above = &staged[0], *below = &staged[1];
        int staged_to = -1;  // rows before this one are in shared memory, those that are of use
        for (int cell = max(first_y - 1, 0); cell <= last_y; ++cell) {
            const int bit = cell - first_y + 1;
            const bool here_in_block = all >> bit & 1, here = mine >> bit & 1;
            const bool has_bottom = vertical.has_next(cell);
            float(&for_above)[PAD] = gathered[cell & 1][place], (&for_below)[PAD] = gathered[~cell & 1][place];
            if (here_in_block) {
                if (staged_to <= cell)
                    stage(*above, origin + cell * row_stride, class_stride, pixel_stride, near_columns, last_column);
                if (has_bottom)
                    stage(*below, origin + (cell + 1) * row_stride, class_stride, pixel_stride, near_columns, last_column);
                staged_to = has_bottom ? cell + 2 : cell + 1;
                __syncthreads();
            }
            if (here) {
                line.load(between, *above, *below, has_bottom, carry);
                carry = has_bottom;
                const float* const top = (*above)[between.left];
                const int to_below = has_bottom ? int((*below)[0] - (*above)[0]) : 0;
                const float last = cell + 1 < int(h) ? 1.0f : 0.0f;
                const int cell_begin = row_starts[bit];
                Offset at = Offset(cell_begin) * width + pixel;
                const float cell_end = float(row_starts[bit + 1]);  // all numbers of rows are exact in float32
                for (float y = float(cell_begin); y < cell_end; y += 1.0f, at += width) {
                    const float value = losses_here[at];
                    const int label = int(target_here[at]);
                    const float weight = value > cut ? 1.0f : value == cut ? share : 0.0f;
                    if (weight == 0.0f) continue;
                    const float fraction = last * (vertical.source(y) - float(cell));
                    const float own = between.score(top + label, to_below, fraction);
                    const float log_sum = fmaf(value, LOG2_E, own);
                    const float weight_below = weight * fraction, weight_above = weight - weight_below;
                    for_above[label] -= weight_above;
                    for_below[label] -= weight_below;
                    if (log_sum > -60.0f) {
                        const float normalizer = fast_exp2(-log_sum);
                        const float a = weight_above * normalizer, b = weight_below * normalizer;
#pragma unroll
                        for (int k = 0; k < K; ++k) {
                            const float exponential = fast_exp2(line.at(k, fraction));
                            row_above[k] = fmaf(a, exponential, row_above[k]);
                            row_below[k] = fmaf(b, exponential, row_below[k]);
                        }
                    } else {  // all are far below
#pragma unroll
                        for (int k = 0; k < K; ++k) {
                            const float probability = fast_exp2(line.at(k, fraction) - log_sum);
                            row_above[k] = fmaf(weight_above, probability, row_above[k]);
                            row_below[k] = fmaf(weight_below, probability, row_below[k]);
                        }
                    }
                }
            } else {
                carry = false;
            }
            const bool some = here_in_block || (bit > 0 && all >> (bit - 1) & 1);
            if (some) {
#pragma unroll
                for (int j = 0; j < QUADS; ++j) {
                    float4 sum = quad(for_above, j);
                    if (4 * j < K) sum.x += row_above[4 * j];
                    if (4 * j + 1 < K) sum.y += row_above[4 * j + 1];
                    if (4 * j + 2 < K) sum.z += row_above[4 * j + 2];
                    if (4 * j + 3 < K) sum.w += row_above[4 * j + 3];
                    quad(for_above, j) = sum;
                }
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    row_above[k] = row_below[k];
                    row_below[k] = 0.0f;
                }
                __syncthreads();
            }
            Logit* const row_out = gradient + image * image_stride_out + cell * row_stride_out + first_x * pixel_stride_out;
            const int part = end - begin <= int(blockDim.x) ? 0 : (base > begin ? 1 : 0) | (base + int(blockDim.x) < end ? 2 : 4);
            const int own_columns = cell < first_y ? 0 : columns;  // the row above the tile belongs to another block
            if (spread)
                for (int item = threadIdx.x; item < own_columns * QUADS; item += blockDim.x)
                    gather<1>(gathered[cell & 1], fractions, starts, some, item / QUADS, item % QUADS, row_out, pixel_stride_out, class_stride_out, scale, sums, part);
            else
                for (int q = threadIdx.x; q < own_columns; q += blockDim.x)
                    gather<QUADS>(gathered[cell & 1], fractions, starts, some, q, 0, row_out, pixel_stride_out, class_stride_out, scale, sums, part);
            if (some) {
                __syncthreads();
                clear(for_above);
            }
            StagedRow* const free = above;
            above = below;
            below = free;
        }
    }
}

#else
// -------------------------------------------------------------------------------------------- any number of classes

// Where a thread reads: its column between two columns of logits.
struct Column {
    int64 class_stride, right;
    bool has_right;
    float left_weight, right_weight;

    __device__ __forceinline__ Column(const Axis& axis, int pixel, int cell, int64 class_stride, int64 pixel_stride)
        : class_stride(class_stride), right(axis.has_next(cell) ? pixel_stride : 0), has_right(axis.has_next(cell)) {
        right_weight = axis.fraction(pixel, cell);
        left_weight = 1.0f - right_weight;
    }
    __device__ __forceinline__ float score(const Logit* logit, const Logit* beside) const {
        return fmaf(has_right ? to_float(*beside) : 0.0f, right_weight, to_float(*logit) * left_weight);
    }
    __device__ __forceinline__ float score(const Logit* logit) const { return score(logit, logit + right); }
    // Score of one class between two rows of logits, read once more: registers have no index.
    __device__ __forceinline__ float score(const Logit* logit, int64 row_stride, bool has_next, float fraction) const {
        const float top = score(logit);
        return has_next ? fmaf(score(logit + row_stride) - top, fraction, top) : top;
    }
};

// Scores of K classes, of which `count` exist, in a column between two rows of logits.
struct Scores {
    float top[K], slope[K];  // at the upper row, and how they change towards the lower one
    bool has_bottom = false;
    int cell = -1;

    __device__ __forceinline__ float at(int k, float fraction) const { return fmaf(slope[k], fraction, top[k]); }
    // The rows around a cell. What the cell before had below, this one has above: it is not read again.
    __device__ __forceinline__ void load(
        const Column& column, const Logit* row, int64 row_stride, int count, int next_cell, bool next_has_bottom) {
        if (has_bottom && next_cell == cell + 1) {
#pragma unroll
            for (int k = 0; k < K; ++k)
                top[k] += slope[k];
        } else {
            read(column, row, count, top);
        }
        cell = next_cell;
        has_bottom = next_has_bottom;
        if (has_bottom) read(column, row + row_stride, count, slope);
#pragma unroll
        for (int k = 0; k < K; ++k)
            slope[k] = has_bottom ? slope[k] - top[k] : 0.0f;
    }
    __device__ __forceinline__ float largest(float fraction, int count) const {
        float highest = -INFINITE;
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (k < count) highest = fmaxf(highest, at(k, fraction));
        return highest;
    }
    // Sum of e^(score - shift).
    __device__ __forceinline__ float exponentials(float fraction, float shift, int count) const {
        float even = 0.0f, odd = 0.0f;  // two sums, since an addition waits for the one before
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (k < count) (k % 2 ? odd : even) += fast_exp2((at(k, fraction) - shift) * LOG2_E);
        return even + odd;
    }

private:
    __device__ __forceinline__ static void read(const Column& column, const Logit* logits, int count, float (&row)[K]) {
        const Logit* beside = logits + column.right;
#pragma unroll
        for (int k = 0; k < K; ++k, logits += column.class_stride, beside += column.class_stride)
            row[k] = k < count ? column.score(logits, beside) : 0.0f;
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK, 3) ohem_forward(
    GEOMETRY, RULE, int64 tile_rows, int64 tile_columns, float* __restrict__ losses, RESULTS) {
    const Axis vertical = {int(h), int(full_h), scale_y, align != 0};
    const Axis horizontal = {int(w), int(full_w), scale_x, align != 0};
    const Tile tile(blockIdx.x, tile_rows, tile_columns, full_h, full_w);
    const int64 image = tile.image;

    const int x = tile.first_x + int(threadIdx.x);
    const bool inside = int(threadIdx.x) < tile_columns && x < full_w;
    const int pixel = inside ? x : int(full_w) - 1;
    const int left = horizontal.cell(pixel);
    const Column column(horizontal, pixel, left, class_stride, pixel_stride);
    const Logit* corner = logits + image * image_stride + left * pixel_stride;

    __shared__ int cells[PIXEL_ROWS];
    __shared__ float fractions[PIXEL_ROWS];
    const int begin = tile.first_y;
    const int rows = min(int(tile_rows), int(full_h) - begin);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        cells[i] = vertical.cell(begin + i);
        fractions[i] = vertical.fraction(begin + i, cells[i]);
    }
    __syncthreads();

    float sum = 0.0f;  // of at most PIXEL_ROWS losses
    unsigned hard = 0, valid = 0;
    bool nan = false;
    const int64 first_pixel = (image * full_h + begin) * full_w + pixel;
    const Label* label_here = target + first_pixel;
    float* loss_here = losses + first_pixel;
    for (int i = 0; i < rows; ++i, label_here += full_w, loss_here += full_w) {
        const Label label = *label_here;
        const bool known = label >= 0 && label < classes;
        const int cell = cells[i];
        const float fraction = fractions[i];
        const Logit* row = corner + cell * row_stride;
        const bool has_bottom = vertical.has_next(cell);

        float highest = -INFINITE, exponentials = 0.0f;
        for (int c = 0; c < int(classes); c += K) {
            const int count = min(K, int(classes) - c);
            Scores chunk;
            chunk.load(column, row + c * class_stride, row_stride, count, cell, has_bottom);
            const float before = highest;
            highest = fmaxf(highest, chunk.largest(fraction, count));
            exponentials = fmaf(exponentials, fast_exp2((before - finite(highest)) * LOG2_E),
                                chunk.exponentials(fraction, finite(highest), count));
        }
        const float own = known ? column.score(row + int64(label) * class_stride, row_stride, has_bottom, fraction) : 0.0f;
        nan |= exponentials != exponentials;

        if (!inside) continue;
        float value = IGNORED;
        if (label != IGNORE) {
            value = known ? (highest - own) + LN_2 * fast_log2(exponentials) : NOT_A_NUMBER;
            if (value <= 0.0f) value = 0.0f;  // rounding; a NaN passes
            ++valid;
            if (!(value <= hard_loss)) {
                ++hard;
                sum += value;
            }
        }
        *loss_here = value;
    }
    if (full_h < h || full_w < w)  // not every logit is next to a pixel
        nan |= any_nan(logits, image_stride, class_stride, row_stride, pixel_stride, images, classes, h, w);
    conclude(sum, hard, valid, nan, hard_loss, numerator, denominator, kept_only, state, slots, selection, loss, n_kept);
}

// Most places of a row of pixels in shared memory. The place of a pixel is its thread plus its cell: a cell has as many
// pixels as the stride, an even number, and with one more, threads that begin at different cells use other banks.
constexpr int PITCH = 2 * BLOCK + 1;

// As above, with one block for each K classes.
extern "C" __global__ void __launch_bounds__(BLOCK, 3) ohem_backward(
    GEOMETRY, const float* __restrict__ losses, const Selection* __restrict__ selection,
    const float* __restrict__ upstream, int64 tile_rows, int64 tile_columns, Logit* __restrict__ gradient,
    int64 image_stride_out, int64 class_stride_out, int64 row_stride_out, int64 pixel_stride_out) {
    __shared__ float gathered[K][PITCH], fractions[PITCH], sums[K];
    __shared__ int starts[BLOCK + 2], row_starts[LOGIT_ROWS + 2];  // of the cells from first_x - 1, first_y - 1

    const Axis vertical = {int(h), int(full_h), scale_y, align != 0};
    const Axis horizontal = {int(w), int(full_w), scale_x, align != 0};
    const int chunks = (int(classes) + K - 1) / K;
    const int first_class = int(blockIdx.x) % chunks * K;
    const int count = min(K, int(classes) - first_class);
    const Tile tile(blockIdx.x / chunks, tile_rows, tile_columns, h, w);
    const int first_x = tile.first_x, first_y = tile.first_y;
    const int64 image = tile.image;
    const int columns = min(int(tile_columns), int(w) - first_x);
    const int last_y = min(first_y + int(tile_rows), int(h)) - 1;

    const float cut = selection->cut, share = selection->share;
    const float scale = selection->scale * *upstream;

    // Threads share the sums of a row such that neighbours write to neighbouring addresses.
    const bool classes_first = class_stride_out == 1;
    const int inner = classes_first ? K : columns;
    const int outer = classes_first ? columns : K;
    const int groups = blockDim.x < unsigned(inner) ? 1 : int(blockDim.x) / inner;

    for (int i = threadIdx.x; i <= last_y + 2 - first_y; i += blockDim.x)
        row_starts[i] = vertical.first(first_y - 1 + i);
    const int begin = horizontal.first(first_x - 1), end = horizontal.first(first_x + columns);
    for (int base = begin; base < end || base == begin; base += blockDim.x) {
        const int x = base + threadIdx.x;
        const bool inside = x < end;
        const int pixel = min(x, int(full_w) - 1);
        const int left = horizontal.cell(pixel);
        const Column column(horizontal, pixel, left, class_stride, pixel_stride);
        const Logit* corner = logits + image * image_stride + left * pixel_stride + first_class * class_stride;

        __syncthreads();
        const int place = threadIdx.x + left - (first_x - 1);
        if (inside) fractions[place] = horizontal.fraction(pixel, left);
        for (int i = threadIdx.x; i < columns + 2; i += blockDim.x) {
            const int start = horizontal.first(first_x - 1 + i) - base;
            starts[i] = max(0, min(start, min(int(blockDim.x), end - base)));
        }
        __syncthreads();

        float row_above[K], row_below[K];  // sums for the rows of logits above and below the cell
        bool some_before = false;
        Scores scores;
#pragma unroll
        for (int i = 0; i < K; ++i)
            row_below[i] = 0.0f;

        int y = row_starts[0];
        for (int cell = max(first_y - 1, 0); cell <= last_y; ++cell) {
            const int cell_end = row_starts[cell - first_y + 2];
            const int64 map = (image * full_h + y) * full_w + pixel;
#pragma unroll
            for (int i = 0; i < K; ++i) {
                row_above[i] = row_below[i];
                row_below[i] = 0.0f;
            }
            bool some = false;
            if (inside) {
#pragma unroll 4
                for (int i = 0; i < cell_end - y; ++i)
                    some |= losses[map + i * full_w] >= cut;
            }
            if (some) {
                const Logit* row = corner + cell * row_stride;
                scores.load(column, row, row_stride, count, cell, vertical.has_next(cell));
                for (int64 here = map; y < cell_end; ++y, here += full_w) {
                    const float value = losses[here];
                    const int label = int(target[here]) - first_class;  // before it is needed: both loads are under way
                    const float weight = value > cut ? 1.0f : value == cut ? share : 0.0f;
                    if (weight == 0.0f) continue;
                    const float fraction = vertical.fraction(y, cell);
                    const float own = column.score(row + label * class_stride, row_stride, scores.has_bottom, fraction);
                    const float own_slope = fast_exp2(-LOG2_E * value) - 1.0f;  // exactly 0 where the loss is
                    const float weight_below = weight * fraction, weight_above = weight - weight_below;
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        const float slope = k == label ? own_slope : fast_exp2(((scores.at(k, fraction) - own) - value) * LOG2_E);
                        row_above[k] = fmaf(weight_above, slope, row_above[k]);
                        row_below[k] = fmaf(weight_below, slope, row_below[k]);
                    }
                }
            }
            y = cell_end;
            if (cell < first_y) {
                some_before = some;
                continue;
            }

            const bool some_in_block = __syncthreads_or(some || some_before);
            some_before = some;
            if (some_in_block) {
#pragma unroll
                for (int i = 0; i < K; ++i)
                    if (inside) gathered[i][place] = row_above[i];
                __syncthreads();
            }
            const int64 inner_stride = classes_first ? 1 : pixel_stride_out;
            const int64 outer_stride = classes_first ? pixel_stride_out : class_stride_out;
            Logit* const row_out = gradient + image * image_stride_out + first_class * class_stride_out +
                                   cell * row_stride_out + first_x * pixel_stride_out;
            for (int i = threadIdx.x % inner; i < inner && int(threadIdx.x) < groups * inner; i += blockDim.x) {
                int j = threadIdx.x / inner;
                Logit* out = row_out + i * inner_stride + j * outer_stride;
                for (; j < outer; j += groups, out += groups * outer_stride) {
                    const int c = classes_first ? i : j, q = classes_first ? j : i;
                    if (c >= count) continue;
                    float sum = 0.0f;
                    if (some_in_block) {
                        const int middle = starts[q + 1] + q, last = starts[q + 2] + q;
#pragma unroll 2
                        for (int p = starts[q] + q; p < middle; ++p)
                            sum = fmaf(fractions[p], gathered[c][p], sum);
#pragma unroll 2
                        for (int p = middle + 1; p <= last; ++p)
                            sum = fmaf(1.0f - fractions[p], gathered[c][p], sum);
                    }
                    if (end - begin > int(blockDim.x)) {  // one logit and class, over several blocks full of pixels
                        if (base > begin) sum += sums[c];
                        sums[c] = sum;
                        if (base + int(blockDim.x) < end) continue;
                    }
                    store(out, sum * scale);
                }
            }
        }
    }
}
#endif
