// Bilinear upsampling + cross entropy + online hard example mining, without the full-size logits. See ../README.md.
//
// Compiled at run time for one type of logits, one type of labels and, up to 32, one number of classes:
//   OHEM_LOGIT    float | half | bfloat16
//   OHEM_LABEL    uint8 | int64
//   OHEM_CLASSES  the number of classes, or 0 for any number, taken CHUNK at a time
// tests/test_kernel.py compiles the same source for the CPU, with what CUDA brings given by tests/cuda_shim.h.
//
// A thread owns one full-size column and walks down it. Between two rows of logits the scores of a pixel are a blend of
// two vectors that stay in registers. Scores are in units of log 2, so that exp2 needs no multiplication.

#ifndef OHEM_LOGIT
#define OHEM_LOGIT float
#define OHEM_LABEL uint8
#define OHEM_CLASSES 19
#endif

typedef unsigned char uint8;
typedef long long int64;
typedef unsigned long long uint64;
struct half { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

typedef OHEM_LOGIT Logit;
typedef OHEM_LABEL Label;

constexpr int BLOCK = 128;          // most threads in a block
constexpr int CHUNK = 16;           // classes at a time when their number is not known
constexpr bool ONE_CHUNK = OHEM_CLASSES > 0;
constexpr int K = ONE_CHUNK ? OHEM_CLASSES : CHUNK;
constexpr int BLOCKS = K > 19 ? 2 : __CUDA_ARCH__ < 900 ? 3 : 4;  // per multiprocessor: as many as ptxas fits unspilled
constexpr int LEVELS = 3;           // a loss is found by its highest 11, then 10, then 10 bits
constexpr int BINS = 2048;
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

    __device__ __forceinline__ float source(int pixel) const {
        return align ? scale * float(pixel) : fmaxf(fmaf(scale, float(pixel) + 0.5f, -0.5f), 0.0f);
    }
    __device__ __forceinline__ int cell(int pixel) const { return min(int(source(pixel)), size - 1); }
    // Weight of the neighbour after `cell`; the last cell has none.
    __device__ __forceinline__ float fraction(int pixel, int cell) const {
        return cell + 1 < size ? source(pixel) - float(cell) : 0.0f;
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

// Where a thread reads: its column between two columns of logits. Weights contain the factor log2(e).
struct Column {
    int64 class_stride, right;
    bool has_right;
    float left_weight, right_weight;

    __device__ __forceinline__ Column(const Axis& axis, int pixel, int cell, int64 class_stride, int64 pixel_stride)
        : class_stride(class_stride), right(pixel_stride), has_right(axis.has_next(cell)) {
        const float fraction = axis.fraction(pixel, cell);
        left_weight = (1.0f - fraction) * LOG2_E;
        right_weight = fraction * LOG2_E;
    }
    __device__ __forceinline__ float score(const Logit* logit) const {
        const float beside = has_right ? to_float(logit[right]) : 0.0f;
        return fmaf(beside, right_weight, to_float(*logit) * left_weight);
    }
    // Scores of K classes, of which `classes` exist. True if one is NaN.
    __device__ __forceinline__ bool scores(const Logit* logits, int classes, float (&out)[K]) const {
        bool nan = false;
#pragma unroll
        for (int i = 0; i < K; ++i) {
            out[i] = ONE_CHUNK || i < classes ? score(logits) : 0.0f;
            nan |= out[i] != out[i];
            logits += class_stride;
        }
        return nan;
    }
};

__device__ __forceinline__ float blend(float top, float bottom, float fraction) {
    return fmaf(bottom, fraction, top * (1.0f - fraction));
}

// Score of one class at a pixel, the same bits as `blend` of `Column::scores` gives.
__device__ __forceinline__ float score_of(
    const Column& column, const Logit* top, int label, int64 row_stride, bool has_bottom, float fraction) {
    top += label * column.class_stride;
    return blend(column.score(top), has_bottom ? column.score(top + row_stride) : 0.0f, fraction);
}

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
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) sum += ((const volatile double*)slots)[i];
    return block_sum(sum);
}

__device__ void finish(const State* state, double total, uint64 kept, Selection* selection, float* loss, int64* n_kept) {
    uint64 divisor = state->kept_only || kept > state->asked ? kept : state->asked;
    if (divisor == 0) divisor = 1;
    *loss = state->nan ? NOT_A_NUMBER : float(total / double(divisor));
    selection->scale = state->nan ? NOT_A_NUMBER : float(1.0 / double(divisor));
    *n_kept = int64(kept);
}

// -------------------------------------------------------------------------------------------------------- forward

// Loss map (IGNORED where the label is `ignore`, NaN where it is unknown), and the selection where enough is hard.
// A block owns blockDim.x columns and `tile_rows` rows of pixels. n_min is valid * numerator / denominator, or numerator
// where the denominator is 0.
extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) ohem_forward(
    const Logit* __restrict__ logits, int64 image_stride, int64 class_stride, int64 row_stride, int64 pixel_stride,
    const Label* __restrict__ target, int64 classes, int64 h, int64 w, int64 full_h, int64 full_w,
    float scale_y, float scale_x, int64 align, int64 images, int64 ignore, float hard_loss, int64 numerator, int64 denominator,
    int64 kept_only, int64 tile_rows, float* __restrict__ losses, State* state, double* slots, Selection* selection,
    float* loss, int64* n_kept) {
    const Axis vertical = {int(h), int(full_h), scale_y, align != 0};
    const Axis horizontal = {int(w), int(full_w), scale_x, align != 0};
    const int tiles_x = int((full_w + blockDim.x - 1) / blockDim.x);
    const int tiles_y = int((full_h + tile_rows - 1) / tile_rows);
    const int tile_x = blockIdx.x % tiles_x;
    const int tile_y = blockIdx.x / tiles_x % tiles_y;
    const int64 image = blockIdx.x / tiles_x / tiles_y;

    const int x = tile_x * blockDim.x + threadIdx.x;
    const bool inside = x < full_w;
    const int pixel = inside ? x : int(full_w) - 1;
    const int left = horizontal.cell(pixel);
    const Column column(horizontal, pixel, left, class_stride, pixel_stride);
    const Logit* corner = logits + image * image_stride + left * pixel_stride;

    double sum = 0.0;
    unsigned hard = 0, valid = 0;
    bool nan = false;
    int loaded = -1;
    bool has_bottom = false;
    float top[K], bottom[K];

    const int begin = tile_y * int(tile_rows);
    const int end = min(begin + int(tile_rows), int(full_h));
    for (int y = begin; y < end; ++y) {
        const int64 here = (image * full_h + y) * full_w + pixel;
        const int64 label = int64(target[here]);
        const int cell = vertical.cell(y);
        const float fraction = vertical.fraction(y, cell);
        const Logit* first_class = corner + cell * row_stride;

        float highest = -INFINITE, exponentials = 0.0f;
        for (int c = 0; c < (ONE_CHUNK ? K : int(classes)); c += K) {
            const int count = ONE_CHUNK ? K : min(K, int(classes) - c);
            if (!ONE_CHUNK || cell != loaded) {
                const Logit* row = first_class + c * class_stride;
                if (ONE_CHUNK && has_bottom && cell == loaded + 1) {
#pragma unroll
                    for (int i = 0; i < K; ++i) top[i] = bottom[i];
                } else {
                    nan |= column.scores(row, count, top);
                }
                has_bottom = vertical.has_next(cell);
                if (has_bottom) {
                    nan |= column.scores(row + row_stride, count, bottom);
                } else {
#pragma unroll
                    for (int i = 0; i < K; ++i) bottom[i] = 0.0f;
                }
                loaded = cell;
            }

            float score[K];
            const float before = highest;
#pragma unroll
            for (int i = 0; i < K; ++i) {
                score[i] = ONE_CHUNK || i < count ? blend(top[i], bottom[i], fraction) : -INFINITE;
                highest = fmaxf(highest, score[i]);
            }
            const float shift = highest == -INFINITE ? 0.0f : highest;
            if (!ONE_CHUNK) exponentials *= fast_exp2(before - shift);
#pragma unroll
            for (int i = 0; i < K; ++i) exponentials += fast_exp2(score[i] - shift);
        }

        if (!inside) continue;
        float value = IGNORED;
        if (label != ignore) {
            value = NOT_A_NUMBER;
            if (label >= 0 && label < classes) {
                const float own = score_of(column, first_class, int(label), row_stride, has_bottom, fraction);
                value = LN_2 * ((highest - own) + log2f(exponentials));
                if (value <= 0.0f) value = 0.0f;  // rounding; a NaN passes
            }
            nan |= value != value;
            ++valid;
            if (!(value <= hard_loss)) {
                ++hard;
                sum += double(value);
            }
        }
        losses[here] = value;
    }

    if (full_h < h || full_w < w) {  // not every logit is next to a pixel: look for NaN in all of them
        const int64 count = images * classes * h * w;
        for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64(gridDim.x) * blockDim.x) {
            const int64 offset = i % w * pixel_stride + i / w % h * row_stride + i / w / h % classes * class_stride +
                                 i / w / h / classes * image_stride;
            const float value = to_float(logits[offset]);
            nan |= value != value;
        }
    }

    sum = block_sum(sum);
    const uint64 hard_here = block_sum(uint64(hard)), valid_here = block_sum(uint64(valid));
    const int nan_here = __syncthreads_or(nan);
    if (threadIdx.x == 0) {
        slots[blockIdx.x] = sum;
        atomicAdd(&state->hard, hard_here);
        atomicAdd(&state->valid, valid_here);
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

// Where too few pixels are hard: find the n_min-th largest loss, `level` 0, 1, 2 after one another. The bits of a
// positive float, read as an integer, have the order of the floats.
extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) ohem_refine(
    const float* __restrict__ losses, int64 pixels, int64 level, State* state, double* slots, Selection* selection,
    float* loss, int64* n_kept) {
    if (!state->refine) return;
    __shared__ unsigned counts[BINS];
    __shared__ Tail suffix[BLOCK + 1];
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) counts[i] = 0;
    __syncthreads();

    const int shift = level == 0 ? 20 : level == 1 ? 10 : 0;
    const unsigned mask = level == 0 ? 2047u : 1023u;
    const unsigned prefix = state->prefix;
    double sum = 0.0;
    unsigned run_bin = 0, run = 0;  // equal neighbours are counted together: most losses of a trained network are 0
#pragma unroll 4
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels; i += int64(gridDim.x) * blockDim.x) {
        const float value = losses[i];
        if (value < 0.0f) continue;
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
    }
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
    const volatile uint64* histogram = state->histogram[level];
    const bool exact = level == LEVELS - 1;
    const int bins = (BINS + blockDim.x - 1) / blockDim.x;
    const int low = min(int(threadIdx.x) * bins, BINS), high = min(low + bins, BINS);
    Tail own = {0, 0.0};
    for (int i = high - 1; i >= low; --i) own.add(histogram[i], exact ? __uint_as_float(prefix << 10 | unsigned(i)) : 0.0f);
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

// ------------------------------------------------------------------------------------------------------- backward

// Shared-memory index of a column: one word of padding every 32, so that threads a power of two apart use other banks.
__device__ __forceinline__ int padded(int i) { return i + i / 32; }
constexpr int PITCH = BLOCK + BLOCK / 32 + 1;

// Gradient of the logits, each element written once by the block that owns it: `tile_rows` x `tile_columns` logits of
// one image, and K classes. The block walks the pixels next to its logits; those on its border are seen by two blocks.
// A thread gathers its column over the rows of a cell; then the columns are gathered through shared memory.
// If the pixels next to one column of logits are more than the block has threads, tile_rows and tile_columns are 1.
extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) ohem_backward(
    const Logit* __restrict__ logits, int64 image_stride, int64 class_stride, int64 row_stride, int64 pixel_stride,
    const Label* __restrict__ target, int64 classes, int64 h, int64 w, int64 full_h, int64 full_w,
    float scale_y, float scale_x, int64 align, const float* __restrict__ losses, const Selection* __restrict__ selection,
    const float* __restrict__ upstream, int64 tile_rows, int64 tile_columns, Logit* __restrict__ gradient,
    int64 image_stride_out, int64 class_stride_out, int64 row_stride_out, int64 pixel_stride_out) {
    __shared__ float gathered[K][PITCH], fractions[PITCH], sums[K];
    __shared__ int starts[BLOCK + 2];

    const Axis vertical = {int(h), int(full_h), scale_y, align != 0};
    const Axis horizontal = {int(w), int(full_w), scale_x, align != 0};
    const int chunks = ONE_CHUNK ? 1 : (int(classes) + K - 1) / K;
    const int tiles_x = int((w + tile_columns - 1) / tile_columns);
    const int tiles_y = int((h + tile_rows - 1) / tile_rows);
    const int first_class = ONE_CHUNK ? 0 : blockIdx.x % chunks * K;
    const int count = ONE_CHUNK ? K : min(K, int(classes) - first_class);
    const int first_x = int(blockIdx.x / chunks % tiles_x * tile_columns);
    const int first_y = int(blockIdx.x / chunks / tiles_x % tiles_y * tile_rows);
    const int64 image = blockIdx.x / chunks / tiles_x / tiles_y;
    const int columns = min(int(tile_columns), int(w) - first_x);
    const int last_y = min(first_y + int(tile_rows), int(h)) - 1;

    const float cut = selection->cut, share = selection->share;
    const float scale = selection->scale * *upstream;

    // Threads share the sums of a row such that neighbours write to neighbouring addresses.
    const bool classes_first = class_stride_out == 1;
    const int inner = classes_first ? K : columns;
    const int outer = classes_first ? columns : K;
    const int groups = blockDim.x < unsigned(inner) ? 1 : int(blockDim.x) / inner;

    const int begin = horizontal.first(first_x - 1), end = horizontal.first(first_x + columns);
    for (int base = begin; base < end || base == begin; base += blockDim.x) {
        const int x = base + threadIdx.x;
        const bool inside = x < end;
        const int pixel = min(x, int(full_w) - 1);
        const int left = horizontal.cell(pixel);
        const Column column(horizontal, pixel, left, class_stride, pixel_stride);
        const Logit* corner = logits + image * image_stride + left * pixel_stride;

        __syncthreads();
        fractions[padded(threadIdx.x)] = horizontal.fraction(pixel, left);
        for (int i = threadIdx.x; i < columns + 2; i += blockDim.x) {
            const int start = horizontal.first(first_x - 1 + i) - base;
            starts[i] = max(0, min(start, min(int(blockDim.x), end - base)));
        }

        float row_above[K], row_below[K];  // sums for the rows of logits above and below the cell
        bool some_before = false;
#pragma unroll
        for (int i = 0; i < K; ++i) row_below[i] = 0.0f;

        int y = vertical.first(first_y - 1);
        for (int cell = max(first_y - 1, 0); cell <= last_y; ++cell) {
            const int cell_end = vertical.first(cell + 1);
            const int64 map = (image * full_h + y) * full_w + pixel;
#pragma unroll
            for (int i = 0; i < K; ++i) {
                row_above[i] = row_below[i];
                row_below[i] = 0.0f;
            }
            bool some = false;
            if (inside) {
#pragma unroll 4
                for (int i = 0; i < cell_end - y; ++i) some |= losses[map + i * full_w] >= cut;
            }
            if (some) {
                const Logit* row = corner + cell * row_stride;
                const bool has_bottom = vertical.has_next(cell);
                float top[K], bottom[K];
                column.scores(row + first_class * class_stride, count, top);
                if (has_bottom) {
                    column.scores(row + first_class * class_stride + row_stride, count, bottom);
                } else {
#pragma unroll
                    for (int i = 0; i < K; ++i) bottom[i] = 0.0f;
                }
                const float* value_here = losses + map;
                const Label* label_here = target + map;
                for (; y < cell_end; ++y, value_here += full_w, label_here += full_w) {
                    const float value = *value_here;
                    const int label = int(*label_here);  // before it is known to be needed: both loads are under way
                    const float weight = value > cut ? 1.0f : value == cut ? share : 0.0f;
                    if (weight == 0.0f) continue;
                    const float fraction = vertical.fraction(y, cell);
                    const float own = score_of(column, row, label, row_stride, has_bottom, fraction);
                    const float log_sum = fmaf(value, LOG2_E, own);
                    const float weight_above = weight * (1.0f - fraction), weight_below = weight * fraction;
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        float slope = fast_exp2(blend(top[k], bottom[k], fraction) - log_sum);
                        if (k == label - first_class) slope -= 1.0f;
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
                for (int i = 0; i < K; ++i) gathered[i][padded(threadIdx.x)] = row_above[i];
                __syncthreads();
            }
            for (int i = threadIdx.x % inner; i < inner && int(threadIdx.x) < groups * inner; i += blockDim.x) {
                for (int j = threadIdx.x / inner; j < outer; j += groups) {
                    const int c = classes_first ? i : j, q = classes_first ? j : i;
                    if (c >= count) continue;
                    float sum = 0.0f;
                    if (some_in_block) {
                        for (int p = starts[q]; p < starts[q + 1]; ++p)
                            sum = fmaf(fractions[padded(p)], gathered[c][padded(p)], sum);
                        for (int p = starts[q + 1]; p < starts[q + 2]; ++p)
                            sum = fmaf(1.0f - fractions[padded(p)], gathered[c][padded(p)], sum);
                    }
                    if (end - begin > int(blockDim.x)) {  // one logit and class, over several blocks full of pixels
                        if (base > begin) sum += sums[c];
                        sums[c] = sum;
                        if (base + int(blockDim.x) < end) continue;
                    }
                    store(gradient + image * image_stride_out + (first_class + c) * class_stride_out +
                              cell * row_stride_out + (first_x + q) * pixel_stride_out,
                          sum * scale);
                }
            }
        }
    }
}
