// Bilinear upsampling + cross entropy + online hard example mining, without the full-size logits. See ../README.md.
//
// Compiled at run time for one type of logits, one type of labels and, up to 32, one number of classes:
//   OHEM_LOGIT    float | half | bfloat16
//   OHEM_LABEL    uint8 | int64
//   OHEM_CLASSES  the number of classes, or 0 for any number, taken CHUNK at a time
// tests/test_kernel.py compiles the same source for the CPU, with what CUDA brings given by tests/cuda_shim.h.
//
// A thread owns one full-size column and walks down it. Between two rows of logits the scores of a pixel are a straight
// line through two vectors that stay in registers. Scores are in units of log 2, so that exp2 needs no multiplication.

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
constexpr int PIXEL_ROWS = 32;      // most rows of pixels in a tile of the forward pass
constexpr int LOGIT_ROWS = 64;      // most rows of logits in a tile of the backward pass
constexpr int CHUNK = 16;           // classes at a time when their number is not known
constexpr bool ONE_CHUNK = OHEM_CLASSES > 0;
constexpr int K = ONE_CHUNK ? OHEM_CLASSES : CHUNK;
constexpr int BLOCKS = K > 19 ? 2 : 3;  // per multiprocessor: as many as ptxas fits unspilled
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
        : class_stride(class_stride), right(axis.has_next(cell) ? pixel_stride : 0), has_right(axis.has_next(cell)) {
        const float fraction = axis.fraction(pixel, cell);
        left_weight = (1.0f - fraction) * LOG2_E;
        right_weight = fraction * LOG2_E;
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

// A largest score as what others are less by: -infinity less itself would be NaN.
__device__ __forceinline__ float finite(float x) { return x == -INFINITE ? 0.0f : x; }

// Scores of K classes, of which `count` exist, in a column between two rows of logits. RELATIVE: less the largest of
// their row. The loss stays the same, since all scores of a pixel become less by the same number.
template <bool RELATIVE>
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
            for (int k = 0; k < K; ++k) top[k] += slope[k];
        } else {
            read(column, row, count, top);
        }
        cell = next_cell;
        has_bottom = next_has_bottom;
        if (has_bottom) read(column, row + row_stride, count, slope);
#pragma unroll
        for (int k = 0; k < K; ++k) slope[k] = has_bottom ? slope[k] - top[k] : 0.0f;
    }
    __device__ __forceinline__ float largest(float fraction, int count) const {
        float highest = -INFINITE;
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (ONE_CHUNK || k < count) highest = fmaxf(highest, at(k, fraction));
        return highest;
    }
    // Sum of 2^(score - shift).
    __device__ __forceinline__ float exponentials(float fraction, float shift, int count) const {
        float even = 0.0f, odd = 0.0f;  // two sums, since an addition waits for the one before
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (ONE_CHUNK || k < count) (k % 2 ? odd : even) += fast_exp2(at(k, fraction) - shift);
        return even + odd;
    }

private:
    __device__ __forceinline__ static void read(const Column& column, const Logit* logits, int count, float (&row)[K]) {
        const Logit* beside = logits + column.right;
        float highest = -INFINITE;
#pragma unroll
        for (int k = 0; k < K; ++k, logits += column.class_stride, beside += column.class_stride) {
            row[k] = ONE_CHUNK || k < count ? column.score(logits, beside) : 0.0f;
            highest = fmaxf(highest, row[k]);
        }
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (RELATIVE) row[k] -= finite(highest);
    }
};

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

    // What all threads need of a row of pixels; and the scores of each thread once more, where they have an index.
    __shared__ int cells[PIXEL_ROWS];
    __shared__ float fractions[PIXEL_ROWS], tops[K][BLOCK], slopes[K][BLOCK];
    const int begin = tile_y * int(tile_rows);
    const int rows = min(int(tile_rows), int(full_h) - begin);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        cells[i] = vertical.cell(begin + i);
        fractions[i] = vertical.fraction(begin + i, cells[i]);
    }
    __syncthreads();

    float sum = 0.0f;  // of at most PIXEL_ROWS losses
    unsigned hard = 0, valid = 0;
    bool nan = false;
    Scores<true> scores;
    const int64 first_pixel = (image * full_h + begin) * full_w + pixel;
    const Label* label_here = target + first_pixel;
    float* loss_here = losses + first_pixel;
    for (int i = 0; i < rows; ++i, label_here += full_w, loss_here += full_w) {
        const Label label = *label_here;
        const bool known = label >= 0 && label < (ONE_CHUNK ? K : classes);
        const int cell = cells[i];
        const float fraction = fractions[i];
        const Logit* row = corner + cell * row_stride;
        const bool has_bottom = vertical.has_next(cell);

        float highest, exponentials, own = 0.0f;
        if (ONE_CHUNK) {
            if (cell != scores.cell) {
                scores.load(column, row, row_stride, K, cell, has_bottom);
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    tops[k][threadIdx.x] = scores.top[k];
                    slopes[k][threadIdx.x] = scores.slope[k];
                }
            }
            highest = 0.0f;  // no score is above
            exponentials = scores.exponentials(fraction, highest, K);
            if (exponentials < 1e-18f) {  // all are far below, where the rows have different largest classes
                highest = finite(scores.largest(fraction, K));
                exponentials = scores.exponentials(fraction, highest, K);
            }
            if (known) own = fmaf(slopes[int(label)][threadIdx.x], fraction, tops[int(label)][threadIdx.x]);
        } else {
            highest = -INFINITE;
            exponentials = 0.0f;
            for (int c = 0; c < int(classes); c += K) {
                const int count = min(K, int(classes) - c);
                Scores<false> chunk;
                chunk.load(column, row + c * class_stride, row_stride, count, cell, has_bottom);
                const float before = highest;
                highest = fmaxf(highest, chunk.largest(fraction, count));
                exponentials = fmaf(exponentials, fast_exp2(before - finite(highest)),
                                    chunk.exponentials(fraction, finite(highest), count));
            }
            if (known) own = column.score(row + int64(label) * class_stride, row_stride, has_bottom, fraction);
        }
        nan |= exponentials != exponentials;

        if (!inside) continue;
        float value = IGNORED;
        if (int64(label) != ignore) {
            value = known ? LN_2 * ((highest - own) + fast_log2(exponentials)) : NOT_A_NUMBER;
            if (value <= 0.0f) value = 0.0f;  // rounding; a NaN passes
            ++valid;
            if (!(value <= hard_loss)) {
                ++hard;
                sum += value;
            }
        }
        *loss_here = value;
    }
    nan |= sum != sum;

    if (full_h < h || full_w < w) {  // not every logit is next to a pixel: look for NaN in all of them
        const int64 count = images * classes * h * w;
        for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64(gridDim.x) * blockDim.x) {
            const int64 offset = i % w * pixel_stride + i / w % h * row_stride + i / w / h % classes * class_stride +
                                 i / w / h / classes * image_stride;
            const float value = to_float(logits[offset]);
            nan |= value != value;
        }
    }

    const double sum_here = block_sum(double(sum));
    const uint64 hard_here = block_sum(uint64(hard)), valid_here = block_sum(uint64(valid));
    const int nan_here = __syncthreads_or(nan);
    if (threadIdx.x == 0) {
        slots[blockIdx.x] = sum_here;
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
    __shared__ uint64 histogram[BINS];
    __shared__ Tail suffix[BLOCK + 1];
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) counts[i] = 0;
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
    for (int64 i = pixels / 4 * 4 + first; i < pixels; i += step) count(losses[i]);
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
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) histogram[i] = all[i];
    __syncthreads();
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

// Most places of a row of pixels in shared memory. The place of a pixel is its thread plus its cell: a cell has as many
// pixels as the stride, an even number, and with one more, threads that begin at different cells use other banks.
constexpr int PITCH = 2 * BLOCK + 1;

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
    __shared__ int starts[BLOCK + 2], row_starts[LOGIT_ROWS + 2];  // of the cells from first_x - 1, first_y - 1

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
        Scores<false> scores;
#pragma unroll
        for (int i = 0; i < K; ++i) row_below[i] = 0.0f;

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
                for (int i = 0; i < cell_end - y; ++i) some |= losses[map + i * full_w] >= cut;
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
                    const float log_sum = fmaf(value, LOG2_E, own);
                    const float own_slope = fast_exp2(-LOG2_E * value) - 1.0f;  // exactly 0 where the loss is
                    const float weight_below = weight * fraction, weight_above = weight - weight_below;
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        const float slope = k == label ? own_slope : fast_exp2(scores.at(k, fraction) - log_sum);
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
                        for (int p = starts[q] + q; p < middle; ++p) sum = fmaf(fractions[p], gathered[c][p], sum);
#pragma unroll 2
                        for (int p = middle + 1; p <= last; ++p) sum = fmaf(1.0f - fractions[p], gathered[c][p], sum);
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
