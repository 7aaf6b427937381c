/* References of higher precision for math_error.py: double for float, __float128 for double.

   cc -O2 -fno-builtin -shared -fPIC math_error.c -lquadmath -lm

   check_float and check_double compare found[i] with function(x[i], y[i]); they keep the largest
   error, in units in the last place of the exact value, and where it is. 0 and NaN must be met
   exactly, with zero's sign; infinity counts as the number after the largest. */

#include <math.h>
#include <quadmath.h>
#include <stdint.h>

typedef __float128 quad;
typedef struct {
    double error, x, y, found, exact;
    int64_t special; /* wrong NaNs, infinities and zeros */
    double special_x, special_y;
} Worst;

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double silu(double x) { return x < -1e3 ? -0.0 : x / (1 + exp(-x)); }
static double gelu(double x) { return x < -1e3 ? -0.0 : 0.5 * x * erfc(-x * M_SQRT1_2); }
static double gelu_tanh(double x) {
    double z = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    return x < -1e3 ? -0.0 : x / (1 + exp(-2 * z));
}
static double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
static double rsqrt(double x) { return 1 / sqrt(x); }
static double remainder_of(double x, double y) {
    double r = fmod(x, y);
    return r == 0 ? copysign(r, y) : (r < 0) != (y < 0) ? r + y : r;
}

static quad sigmoidq(quad x) { return 1 / (1 + expq(-x)); }
static quad siluq(quad x) { return x < -1e3 ? -0.0Q : x / (1 + expq(-x)); }
static quad geluq(quad x) { return x < -1e3 ? -0.0Q : x * erfcq(-x * M_SQRT1_2q) / 2; }
static quad gelu_tanhq(quad x) {
    quad z = 2 * sqrtq(2 / M_PIq) * (x + 0.044715Q * x * x * x);
    return x < -1e3 ? -0.0Q : x / (1 + expq(-z));
}
static quad softplusq(quad x) { return x > 0 ? x + log1pq(expq(-x)) : log1pq(expq(x)); }
static quad rsqrtq(quad x) { return 1 / sqrtq(x); }
static quad remainder_ofq(quad x, quad y) {
    quad r = fmodq(x, y);
    return r == 0 ? copysignq(r, y) : (r < 0) != (y < 0) ? r + y : r;
}

/* In the order of math_error.py's names */
static double (*const UNARY[])(double) = {
    exp, expm1, log, log1p, tanh, sin, cos, erf, sqrt, rsqrt,
    sigmoid, silu, gelu, gelu_tanh, softplus};
static quad (*const UNARYQ[])(quad) = {
    expq, expm1q, logq, log1pq, tanhq, sinq, cosq, erfq, sqrtq, rsqrtq,
    sigmoidq, siluq, geluq, gelu_tanhq, softplusq};
static double (*const BINARY[])(double, double) = {pow, remainder_of};
static quad (*const BINARYQ[])(quad, quad) = {powq, remainder_ofq};

static void keep(Worst *worst, double error, double x, double y, double found, double exact) {
    if (error > worst->error) *worst = (Worst){
        error, x, y, found, exact, worst->special, worst->special_x, worst->special_y};
}

static void note(Worst *worst, double x, double y) {
    if (!worst->special++) worst->special_x = x, worst->special_y = y;
}

/* The unit is that of the last place of |exact|, at least of 2^lowest. */
#define CHECK(NAME, FLOAT, WIDE, ONE, TWO, ABS, LOGB, LDEXP, DIGITS, TOP)                          \
    void NAME(int function, const FLOAT *x, const FLOAT *y, const FLOAT *found, int64_t count,     \
              int lowest, Worst *worst) {                                                          \
        const WIDE limit = LDEXP((WIDE)1, TOP), half = LDEXP((WIDE)1, TOP - DIGITS - 1);           \
        for (int64_t i = 0; i < count; i++) {                                                      \
            WIDE exact = y ? TWO[function](x[i], y[i]) : ONE[function](x[i]), size = ABS(exact);   \
            double b = y ? y[i] : 0;                                                               \
            FLOAT f = found[i];                                                                    \
            int over = size >= limit - half;                                                       \
            if (exact != exact || f != f || size == 0) {                                           \
                int bad = size == 0 ? f != 0 || !signbit(f) != !(1 / exact < 0)                    \
                                    : (exact == exact) || (f == f);                                \
                if (bad) note(worst, x[i], b);                                                     \
                continue;                                                                          \
            }                                                                                      \
            if (isinf(f) || over) {                                                                \
                WIDE reach = isinf(f) ? (f < 0 ? -limit : limit) : f;                              \
                WIDE value = size > limit ? (exact < 0 ? -limit : limit) : exact;                  \
                keep(worst, (double)(ABS(reach - value) / (2 * half)), x[i], b, f, (double)exact); \
                continue;                                                                          \
            }                                                                                      \
            int place = LOGB(size);                                                                \
            WIDE unit = LDEXP((WIDE)1, (place < lowest ? lowest : place) - DIGITS);                \
            keep(worst, (double)(ABS(f - exact) / unit), x[i], b, f, (double)exact);               \
        }                                                                                          \
    }

CHECK(check_float, float, double, UNARY, BINARY, fabs, ilogb, ldexp, 23, 128)
CHECK(check_double, double, quad, UNARYQ, BINARYQ, fabsq, ilogbq, ldexpq, 52, 1024)
