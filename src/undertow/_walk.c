/* One walk over float32 values in memory for what several measures need, and one that counts codes.

   Plain C and the stable ABI of Python 3.11. Where this cannot be built, undertow measures with the framework's own
   operations: the same numbers, in three to five walks. The interpreter is free while these run. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <math.h>
#include <stdint.h>

#define CODES 65536
#define TURNS 4
#define PIECE 2048
#define LINE 16    /* values in a line of a cache */
#define AHEAD 2048 /* values that memory is asked for beforehand */

/* The loader picks the wider form where the processor has it. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif

#if defined(__GNUC__)
#define NEAR(x) __builtin_prefetch(x)
#else
#define NEAR(x)
#endif

/* Sums are in double, so that a float's square is exact. */
typedef struct {
    double sum, squares;
    float low, high;
    int64_t zeros;
} Seen;

static const Seen NOTHING = {0, 0, INFINITY, -INFINITY, 0};

static void join(Seen *all, Seen one)
{
    all->sum += one.sum;
    all->squares += one.squares;
    all->low = one.low < all->low ? one.low : all->low;
    all->high = one.high > all->high ? one.high : all->high;
    all->zeros += one.zeros;
}

/* The same for every LINE-th value: so many sums need not wait for each other. */
typedef struct {
    double sum[LINE], squares[LINE];
    float low[LINE], high[LINE];
    int32_t zeros[LINE];
} Lanes;

static inline void take(Lanes *lanes, int lane, float v)
{
    double d = v;
    lanes->sum[lane] += d;
    lanes->squares[lane] += d * d;
    lanes->zeros[lane] += v == 0;
    lanes->low[lane] = v < lanes->low[lane] ? v : lanes->low[lane];
    lanes->high[lane] = v > lanes->high[lane] ? v : lanes->high[lane];
}

/* What is in some rows, and each one's norm. */
WIDEST static Seen look(const float *x, Py_ssize_t rows, Py_ssize_t n, float *norms)
{
    Seen all = NOTHING;
    Lanes lanes = {{0}, {0}, {0}, {0}, {0}};
    for (int lane = 0; lane < LINE; lane++)
        lanes.low[lane] = INFINITY, lanes.high[lane] = -INFINITY;
    for (Py_ssize_t row = 0; row < rows; row++, x += n) {
        Py_ssize_t i = 0;
        double squares = 0;
        for (int lane = 0; lane < LINE; lane++)
            lanes.squares[lane] = 0;
        for (; i + LINE <= n; i += LINE) {
            NEAR(x + i + AHEAD);
#pragma omp simd
            for (int lane = 0; lane < LINE; lane++)
                take(&lanes, lane, x[i + lane]);
        }
        for (int lane = 0; i + lane < n; lane++)
            take(&lanes, lane, x[i + lane]);
#pragma omp simd reduction(+ : squares)
        for (int lane = 0; lane < LINE; lane++)
            squares += lanes.squares[lane];
        norms[row] = (float)sqrt(squares);
        all.squares += squares;
    }
    for (int lane = 0; lane < LINE; lane++)
        join(&all, (Seen){lanes.sum[lane], 0, lanes.low[lane], lanes.high[lane], lanes.zeros[lane]});
    return all;
}

/* A row's sum and sum of magnitudes. */
WIDEST static void total(const float *x, Py_ssize_t n, double *two)
{
    double sum = 0, magnitudes = 0;
#pragma omp simd reduction(+ : sum, magnitudes)
    for (Py_ssize_t i = 0; i < n; i++) {
        sum += x[i];
        magnitudes += fabs((double)x[i]);
    }
    two[0] = sum, two[1] = magnitudes;
}

WIDEST static double deviations(const float *x, Py_ssize_t n, double mean)
{
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (Py_ssize_t i = 0; i < n; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    return squares;
}

/* The rows of one block; rows of one value are looked at as one. */
static Seen some(const float *x, Py_ssize_t rows, Py_ssize_t n, float *norms, double *sums)
{
    float whole;
    for (Py_ssize_t row = 0; n == 1 && row < rows; row++)
        norms[row] = fabsf(x[row]);
    Seen block = n == 1 ? look(x, 1, rows, &whole) : look(x, rows, n, norms);
    for (Py_ssize_t row = 0; sums && row < rows; row++) /* while they are near */
        total(x + row * n, n, sums + 2 * row);
    return block;
}

/* Blocks of about PIECE values are added in their order, so that the number of threads changes no bit. `blocks` has
   room for each of them. */
static Seen walk(const float *x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t block, Seen *blocks, float *norms,
                 double *sums, int threads)
{
    Py_ssize_t count = (rows + block - 1) / block;
    Seen all = NOTHING;
#pragma omp parallel for num_threads(threads)
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t row = i * block, size = rows - row < block ? rows - row : block;
        blocks[i] = some(x + row * n, size, n, norms + row, sums ? sums + 2 * row : NULL);
    }
    for (Py_ssize_t i = 0; i < count; i++)
        join(&all, blocks[i]);
    if (isnan(all.squares)) /* comparisons pass over what is not a number */
        all.low = all.high = NAN;
    return all;
}

/* The sum of squared deviations from the mean, in a second walk where too few digits are left of it otherwise. */
static double spread(const float *x, Py_ssize_t n, Seen all, int threads)
{
    double mean = all.sum / n, squares = all.squares - mean * all.sum;
    if (!(squares < 1e-4 * all.squares))
        return squares;
    squares = 0;
#pragma omp parallel for ordered schedule(static, 1) num_threads(threads)
    for (Py_ssize_t start = 0; start < n; start += PIECE) {
        double part = deviations(x + start, n - start < PIECE ? n - start : PIECE, mean);
#pragma omp ordered
        squares += part;
    }
    return squares;
}

typedef struct {
    uint32_t low, high;
} Range;

/* The smallest and the largest code of what is not zero, without its sign; low > high where all is zero. */
WIDEST static Range range(const uint32_t *x, Py_ssize_t n)
{
    uint32_t low = UINT32_MAX, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t doubled = x[i] << 1, less = doubled - 1; /* the sign is gone, and zero is the largest */
        low = less < low ? less : low;
        high = doubled > high ? doubled : high;
    }
    return (Range){low == UINT32_MAX ? CODES : (low + 1) >> 17, high >> 17};
}

/* Four counters for each code, in turn: equal neighbours, mostly zeros, would wait for each other at one. */
static Range fill(const uint32_t *x, Py_ssize_t n, uint32_t *table)
{
    Range all = {CODES, 0};
    for (Py_ssize_t start = 0; start < n; start += 4096) {
        const uint32_t *some = x + start;
        Py_ssize_t i = 0, size = n - start < 4096 ? n - start : 4096;
        Range these = range(some, size);
        all.low = these.low < all.low ? these.low : all.low;
        all.high = these.high > all.high ? these.high : all.high;
        for (; i + LINE <= size; i += LINE) {
            NEAR(some + 4096 + i); /* or counting would wait for memory each time that `range` begins */
            for (int t = 0; t < LINE; t++)
                table[(some[i + t] >> 16) * TURNS + t % TURNS]++;
        }
        for (; i < size; i++)
            table[(some[i] >> 16) * TURNS]++;
    }
    return all;
}

/* Count into the tables, then list the codes that occur, and clear the tables; `codes` and `counts` have room for all.
   Only between the smallest and the largest: to read all of the tables would take longer than to count. */
static Py_ssize_t tally(const uint32_t *x, Py_ssize_t n, uint32_t *tables, int threads, uint16_t *codes,
                        int64_t *counts)
{
    uint32_t low = CODES / 2, high = 0;
    Py_ssize_t listed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(min : low) reduction(max : high)
    for (int part = 0; part < threads; part++) {
        Py_ssize_t from = n / threads * part, to = part + 1 < threads ? from + n / threads : n;
        Range found = fill(x + from, to - from, tables + (size_t)part * CODES * TURNS);
        low = found.low < low ? found.low : low;
        high = found.high > high ? found.high : high;
    }
    for (uint32_t sign = 0; sign < CODES; sign += CODES / 2)
        for (uint32_t code = 0; code <= high; code = code < low ? (low > 1 ? low : 1) : code + 1) {
            int64_t here = 0;
            for (int part = 0; part < threads; part++) {
                uint32_t *found = tables + ((size_t)part * CODES + sign + code) * TURNS;
                for (int t = 0; t < TURNS; t++) {
                    here += found[t];
                    found[t] = 0;
                }
            }
            codes[listed] = (uint16_t)(sign + code);
            counts[listed] = here;
            listed += here != 0;
        }
    return listed;
}

PyDoc_STRVAR(reduce_doc,
"reduce(values, rows, sums, threads) -> (norms, mean, m2, low, high, zeros)\n\n"
"`values`: float32, of so many rows of equal length. `norms`: bytes of float32 (rows,), each row's l2 norm. Of all\n"
"values: the mean, the sum of squared deviations from it, the smallest, the largest, and how many are zero. `sums`,\n"
"None or float64 (rows, 2), is filled with each row's sum and sum of magnitudes.\n");

static PyObject *reduce(PyObject *self, PyObject *args)
{
    Py_buffer values, sums = {0};
    PyObject *wanted, *norms = NULL, *result = NULL;
    Py_ssize_t rows;
    int threads;
    if (!PyArg_ParseTuple(args, "y*nOi:reduce", &values, &rows, &wanted, &threads))
        return NULL;
    const Py_ssize_t n = values.len / (Py_ssize_t)sizeof(float);
    if (wanted != Py_None && PyObject_GetBuffer(wanted, &sums, PyBUF_CONTIG) < 0)
        goto end;
    if (rows < 1 || n < rows || n % rows || threads < 1 ||
        (sums.buf && sums.len != rows * 2 * (Py_ssize_t)sizeof(double))) {
        PyErr_SetString(PyExc_ValueError, "values, rows, sums and threads do not fit together");
        goto end;
    }
    const Py_ssize_t block = n / rows < PIECE ? PIECE / (n / rows) : 1;
    Seen *blocks = PyMem_Malloc((size_t)(rows / block + 1) * sizeof(Seen)), all;
    double m2;
    if (!blocks || !(norms = PyBytes_FromStringAndSize(NULL, rows * (Py_ssize_t)sizeof(float)))) {
        PyMem_Free(blocks);
        PyErr_NoMemory();
        goto end;
    }
    float *room = (float *)PyBytes_AsString(norms);
    Py_BEGIN_ALLOW_THREADS
    all = walk(values.buf, rows, n / rows, block, blocks, room, sums.buf, threads);
    m2 = spread(values.buf, n, all, threads);
    Py_END_ALLOW_THREADS
    PyMem_Free(blocks);
    result = Py_BuildValue("OddddL", norms, all.sum / (double)n, m2, (double)all.low, (double)all.high,
                           (long long)all.zeros);
end:
    Py_XDECREF(norms);
    if (sums.obj)
        PyBuffer_Release(&sums);
    PyBuffer_Release(&values);
    return result;
}

PyDoc_STRVAR(count_doc,
"count(values, tables) -> (codes, counts)\n\n"
"The upper 16 bits of float32 values that occur, in rising order, as bytes of uint16, and how often each does, as\n"
"bytes of int64. `tables`, uint32 (threads, 65536, 4), must hold zeros, and does again afterwards.\n");

static PyObject *count(PyObject *self, PyObject *args)
{
    Py_buffer values, tables;
    if (!PyArg_ParseTuple(args, "y*w*:count", &values, &tables))
        return NULL;
    const Py_ssize_t n = values.len / (Py_ssize_t)sizeof(uint32_t);
    const Py_ssize_t threads = tables.len / (Py_ssize_t)(CODES * TURNS * sizeof(uint32_t));
    PyObject *result = NULL;
    int64_t *counts = PyMem_Malloc(CODES * (sizeof(int64_t) + sizeof(uint16_t)));
    uint16_t *codes = (uint16_t *)(counts + CODES);
    if (threads < 1 || threads > 1024 || n > (Py_ssize_t)UINT32_MAX) { /* a counter has 32 bits */
        PyErr_SetString(PyExc_ValueError, "values or tables have not the right size");
    } else if (!counts) {
        PyErr_NoMemory();
    } else {
        Py_ssize_t listed;
        Py_BEGIN_ALLOW_THREADS
        listed = tally(values.buf, n, tables.buf, (int)threads, codes, counts);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("y#y#", (const char *)codes, listed * (Py_ssize_t)sizeof(uint16_t), (const char *)counts,
                               listed * (Py_ssize_t)sizeof(int64_t));
    }
    PyMem_Free(counts);
    PyBuffer_Release(&values);
    PyBuffer_Release(&tables);
    return result;
}

static PyMethodDef methods[] = {
    {"reduce", reduce, METH_VARARGS, reduce_doc},
    {"count", count, METH_VARARGS, count_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "undertow._walk", "Walks over float32 values.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__walk(void)
{
    return PyModuleDef_Init(&module);
}
