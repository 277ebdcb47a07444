/* Divergences of one shard on CPU: every logit is read once in forward and once in backward, and nothing of the
 * logits' width is stored besides the gradient. The readable form is eager.py; cpu_kernels.py compiles and calls this.
 *
 * Each function takes `rows` tokens of `width` logits (p, q: [rows, width], of any distance between rows), fp32
 * numbers per token, the number of threads that share out the tokens, and the temperature T. Exponentials are powers of
 * two: e^(x / T) = 2^(x per_unit). Sums run in fp32 over BLOCK columns, then in double, in one order: the same bits for
 * any number of threads. Weight 0 counts for nothing, so -inf may stand in a column on both sides.
 */
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define BLOCK 256 /* even; an fp32 sum of more is less exact on 4 lanes */
#define LOG2E 1.4426950408889634
#define LN2 0.69314718055994531
#define MIN(a, b) ((a) < (b) ? (a) : (b))

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* Columns are taken two at a time: those of bf16 that share a word, of fp32 those that are half a block apart. */
typedef uint16_t bf16;
typedef struct { float a, b; } pair;

static inline pair load_bf16(const bf16 *x, long j, long half) {
    uint32_t word;
    (void)half, memcpy(&word, x + 2 * j, 4);
    return (pair){bits_to_float(word << 16), bits_to_float(word & 0xffff0000u)};
}
static inline uint32_t rounded(float x) { /* to nearest, ties to even, as torch; a NaN of arithmetic stays one */
    uint32_t bits = float_to_bits(x);
    return bits + 0x7fff + ((bits >> 16) & 1);
}
static inline void store_bf16(bf16 *out, long j, long half, pair x) {
    uint32_t word = rounded(x.a) >> 16 | (rounded(x.b) & 0xffff0000u);
    (void)half, memcpy(out + 2 * j, &word, 4);
}
static inline pair load_f32(const float *x, long j, long half) { return (pair){x[j], x[j + half]}; }
static inline void store_f32(float *out, long j, long half, pair x) { out[j] = x.a, out[j + half] = x.b; }

/* 2^t for t < 128; 0 below -126.5, NaN for NaN; with fused products within 2 units in the last place of 2^t.
 * Branch-free: 2^n times a polynomial in r = t - n, the best of degree 5 that is 1 at 0 (relative error 9.2e-8). */
static inline float exp2_(float t) {
    const float magic = 12583039.0f; /* 1.5 * 2^23 + 127: adding it leaves the exponent's bits of 2^n in the low ones */
    t = t < -127.0f ? -127.0f : t;
    float shifted = t + magic;
    float r = t - (shifted - magic);
    float y = 1.326465918e-3f;
    y = y * r + 9.671566164e-3f;
    y = y * r + 5.550734584e-2f;
    y = y * r + 2.402224118e-1f;
    y = y * r + 6.931469740e-1f;
    y = y * r + 1.0f;
    return y * bits_to_float(float_to_bits(shifted) << 23);
}

/* sum * 2^reference and weighed * 2^reference: the reference is a peak that was met, raised by far higher ones only. */
typedef struct { float reference; double sum, weighed; } online;

static inline int raise_to(online *all, float peak) {
    if (!(peak - all->reference > 60)) return 0;
    double scale = exp2(all->reference - (double)peak);
    all->sum *= scale, all->weighed *= scale, all->reference = peak;
    return 1;
}

static inline float lse(online all) { return all.sum == 0 ? -INFINITY : (all.reference + log2(all.sum)) * LN2; }

/* softmax(x / T) = 2^(x per_unit - shift) * factor: what rounding the shift to fp32 loses is in the factor. */
static inline float softmax_shift(float lse, float *factor) {
    float shift = lse * LOG2E;
    *factor *= exp2(shift - lse * LOG2E);
    return shift;
}

/* Fresh memory page by page costs as much as a third of the gradient. */
static void ask_for_huge_pages(void *start, long bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t huge = 2 << 20, first = ((uintptr_t)start + huge - 1) & -huge;
    const uintptr_t end = ((uintptr_t)start + bytes) & -huge;
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE); /* refused: pages are small */
#else
    (void)start, (void)bytes;
#endif
}

#define KERNELS(T, SUFFIX, NOTHING)                                                                                    \
/* x, or its copy with one more column that counts for nothing, if columns are odd. */                                 \
static inline const T *even_##SUFFIX(const T *x, long n, T *copy) {                                                    \
    if (n % 2 == 0) return x;                                                                                          \
    memcpy(copy, x, n * sizeof(T)), copy[n] = NOTHING;                                                                 \
    return copy;                                                                                                       \
}                                                                                                                      \
/* p_lse = lse(p / T), mean = E_softmax(p / T)[p / T - q / T], q_lse = lse(q / T). */                                  \
void kl_statistics_##SUFFIX(const T *p, long p_stride, const T *q, long q_stride, long rows, long width,               \
                            int threads, float temperature, float *p_lse, float *mean, float *q_lse) {                 \
    const float per_unit = LOG2E / temperature;                                                                        \
    _Pragma("omp parallel for num_threads(threads)")                                                                   \
    for (long i = 0; i < rows; i++) {                                                                                  \
        const T *p_row = p + i * p_stride, *q_row = q + i * q_stride;                                                  \
        online P = {-1e30f, 0, 0}, Q = {-1e30f, 0, 0};                                                                 \
        for (long start = 0; start < width; start += BLOCK) {                                                          \
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;                                              \
            T x_copy[BLOCK], y_copy[BLOCK];                                                                            \
            const T *xs = even_##SUFFIX(p_row + start, n, x_copy), *ys = even_##SUFFIX(q_row + start, n, y_copy);      \
            float x_peak, y_peak, x_sum, y_sum, weighed;                                                               \
            do {                                                                                                       \
                const float x_reference = P.reference, y_reference = Q.reference;                                      \
                x_peak = y_peak = -INFINITY, x_sum = y_sum = weighed = 0;                                              \
                _Pragma("omp simd reduction(max : x_peak, y_peak) reduction(+ : x_sum, y_sum, weighed)")               \
                for (long j = 0; j < half; j++) {                                                                      \
                    const pair x = load_##SUFFIX(xs, j, half), y = load_##SUFFIX(ys, j, half);                         \
                    const float x_max = x.a > x.b ? x.a : x.b, y_max = y.a > y.b ? y.a : y.b;                          \
                    const float u = exp2_(x.a * per_unit - x_reference), v = exp2_(x.b * per_unit - x_reference);      \
                    x_peak = x_max > x_peak ? x_max : x_peak;                                                          \
                    y_peak = y_max > y_peak ? y_max : y_peak;                                                          \
                    x_sum += u + v;                                                                                    \
                    y_sum += exp2_(y.a * per_unit - y_reference) + exp2_(y.b * per_unit - y_reference);                \
                    weighed += u * (u == 0.0f ? 0.0f : x.a - y.a) + v * (v == 0.0f ? 0.0f : x.b - y.b);                \
                }                                                                                                      \
            } while (raise_to(&P, x_peak * per_unit) | raise_to(&Q, y_peak * per_unit));                               \
            P.sum += x_sum, P.weighed += weighed, Q.sum += y_sum;                                                      \
        }                                                                                                              \
        p_lse[i] = lse(P), q_lse[i] = lse(Q);                                                                          \
        mean[i] = P.sum == 0 ? 0 : P.weighed / P.sum / temperature;                                                    \
    }                                                                                                                  \
}                                                                                                                      \
/* gradient = (softmax(z) - softmax(t)) * grad / T, 0 where grad is 0. */                                              \
void forward_kl_gradient_##SUFFIX(const T *z, long z_stride, const T *t, long t_stride, long rows, long width,         \
                                  int threads, float temperature, const float *z_lse, const float *t_lse,              \
                                  const float *grad, T *out, long out_stride) {                                        \
    const float per_unit = LOG2E / temperature;                                                                        \
    if (out_stride == width) ask_for_huge_pages(out, rows * width * sizeof(T));                                        \
    _Pragma("omp parallel for num_threads(threads)")                                                                   \
    for (long i = 0; i < rows; i++) {                                                                                  \
        const T *z_row = z + i * z_stride, *t_row = t + i * t_stride;                                                  \
        T *out_row = out + i * out_stride;                                                                             \
        if (grad[i] == 0.0f) { memset(out_row, 0, width * sizeof(T)); continue; }                                      \
        float q_scale = grad[i] / temperature, p_scale = q_scale;                                                      \
        const float q_shift = softmax_shift(z_lse[i], &q_scale), p_shift = softmax_shift(t_lse[i], &p_scale);          \
        for (long start = 0; start < width; start += BLOCK) {                                                          \
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;                                              \
            T x_copy[BLOCK], y_copy[BLOCK];                                                                            \
            const T *xs = even_##SUFFIX(z_row + start, n, x_copy), *ys = even_##SUFFIX(t_row + start, n, y_copy);      \
            T *to = n % 2 ? x_copy : out_row + start;                                                                  \
            _Pragma("omp simd")                                                                                        \
            for (long j = 0; j < half; j++) {                                                                          \
                const pair x = load_##SUFFIX(xs, j, half), y = load_##SUFFIX(ys, j, half);                             \
                const float q_a = exp2_(x.a * per_unit - q_shift), p_a = exp2_(y.a * per_unit - p_shift);              \
                const float q_b = exp2_(x.b * per_unit - q_shift), p_b = exp2_(y.b * per_unit - p_shift);              \
                const pair gradient = {q_a * q_scale - p_a * p_scale, q_b * q_scale - p_b * p_scale};                  \
                store_##SUFFIX(to, j, half, gradient);                                                                 \
            }                                                                                                          \
            if (n % 2) memcpy(out_row + start, to, n * sizeof(T));                                                     \
        }                                                                                                              \
    }                                                                                                                  \
}                                                                                                                      \
/* gradient = q (z/T - t/T - mean) * grad / T, q = softmax(z), 0 where grad or q is 0. */                              \
void reverse_kl_gradient_##SUFFIX(const T *z, long z_stride, const T *t, long t_stride, long rows, long width,         \
                                  int threads, float temperature, const float *z_lse, const float *mean,               \
                                  const float *grad, T *out, long out_stride) {                                        \
    const float per_unit = LOG2E / temperature, inverse = 1.0f / temperature;                                          \
    if (out_stride == width) ask_for_huge_pages(out, rows * width * sizeof(T));                                        \
    _Pragma("omp parallel for num_threads(threads)")                                                                   \
    for (long i = 0; i < rows; i++) {                                                                                  \
        const T *z_row = z + i * z_stride, *t_row = t + i * t_stride;                                                  \
        T *out_row = out + i * out_stride;                                                                             \
        if (grad[i] == 0.0f) { memset(out_row, 0, width * sizeof(T)); continue; }                                      \
        float scale = grad[i] / temperature;                                                                           \
        const float shift = softmax_shift(z_lse[i], &scale), m = mean[i];                                              \
        for (long start = 0; start < width; start += BLOCK) {                                                          \
            const long n = MIN(BLOCK, width - start), half = (n + 1) / 2;                                              \
            T x_copy[BLOCK], y_copy[BLOCK];                                                                            \
            const T *xs = even_##SUFFIX(z_row + start, n, x_copy), *ys = even_##SUFFIX(t_row + start, n, y_copy);      \
            T *to = n % 2 ? x_copy : out_row + start;                                                                  \
            _Pragma("omp simd")                                                                                        \
            for (long j = 0; j < half; j++) {                                                                          \
                const pair x = load_##SUFFIX(xs, j, half), y = load_##SUFFIX(ys, j, half);                             \
                const float a = exp2_(x.a * per_unit - shift), b = exp2_(x.b * per_unit - shift);                      \
                const pair gradient = {                                                                                \
                    a == 0.0f ? 0.0f : ((x.a - y.a) * inverse - m) * a * scale,                                        \
                    b == 0.0f ? 0.0f : ((x.b - y.b) * inverse - m) * b * scale,                                        \
                };                                                                                                     \
                store_##SUFFIX(to, j, half, gradient);                                                                 \
            }                                                                                                          \
            if (n % 2) memcpy(out_row + start, to, n * sizeof(T));                                                     \
        }                                                                                                              \
    }                                                                                                                  \
}

KERNELS(bf16, bf16, 0xff80)
KERNELS(float, f32, -INFINITY)
