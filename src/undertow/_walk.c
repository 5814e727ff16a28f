/* One walk over float32 values in memory for what several measures need, and one that counts codes.

   Plain C and the stable ABI of Python 3.11. Where this cannot be built, undertow measures with the framework's own
   operations: the same numbers, in three to five walks. The interpreter is free while these run. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#define CODES 65536
#define TURNS 4
#define PIECE 2048
#define LINE 16    /* values in a line of a cache */
#define PLACES 4   /* that are looked at in turn */
#define AHEAD 512  /* values that memory is asked for beforehand */
#define ROOM (1 << 20) /* bytes of memory that small results share */

/* The loader picks the wider form where the processor has it. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif

#if defined(__GNUC__)
#define NEAR(x) __builtin_prefetch(x)
#define INLINE inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 4")
#else
#define NEAR(x)
#define INLINE inline
#define UNROLLED
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
    double sum[LINE];
    float low[LINE], high[LINE];
    int32_t zeros[LINE];
} Lanes;

static inline void take(Lanes *lanes, double *squares, int lane, float v)
{
    double d = v;
    lanes->sum[lane] += d;
    squares[lane] += d * d;
    lanes->zeros[lane] = v == 0 ? lanes->zeros[lane] + 1 : lanes->zeros[lane];
    lanes->low[lane] = v < lanes->low[lane] ? v : lanes->low[lane];
    lanes->high[lane] = v > lanes->high[lane] ? v : lanes->high[lane];
}

/* In pairs, of which none waits for another: one by one takes as long as four lines. */
static INLINE double together(const double *of)
{
    return (((of[0] + of[8]) + (of[4] + of[12])) + ((of[2] + of[10]) + (of[6] + of[14]))) +
           (((of[1] + of[9]) + (of[5] + of[13])) + ((of[3] + of[11]) + (of[7] + of[15])));
}

/* What is in some rows at so many places, and each row's norm. The places are `apart` rows from each other. */
static INLINE Seen look(const float *x, Py_ssize_t rows, Py_ssize_t n, float *norms, const int places, Py_ssize_t apart)
{
    Seen all = NOTHING;
    Lanes lanes = {{0}, {0}, {0}, {0}};
    for (int lane = 0; lane < LINE; lane++)
        lanes.low[lane] = INFINITY, lanes.high[lane] = -INFINITY;
    for (Py_ssize_t row = 0; row < rows; row++) {
        double squares[PLACES][LINE] = {{0}};
        Py_ssize_t i = 0;
        for (; i + LINE <= n; i += LINE)
            UNROLLED for (int place = 0; place < places; place++) {
                const float *line = x + (row + place * apart) * n + i;
                NEAR(line + AHEAD);
#pragma omp simd
                for (int lane = 0; lane < LINE; lane++)
                    take(&lanes, squares[place], lane, line[lane]);
            }
        UNROLLED for (int place = 0; place < places; place++) {
            double whole = together(squares[place]);
            for (Py_ssize_t rest = i; rest < n; rest++) { /* apart from the lanes, which stay in registers */
                float v = x[(row + place * apart) * n + rest];
                join(&all, (Seen){v, 0, v, v, v == 0});
                whole += (double)v * v;
            }
            norms[row + place * apart] = (float)sqrt(whole);
            all.squares += whole;
        }
    }
    for (int lane = 0; lane < LINE; lane++)
        join(&all, (Seen){lanes.sum[lane], 0, lanes.low[lane], lanes.high[lane], lanes.zeros[lane]});
    return all;
}

WIDEST static Seen look_here(const float *x, Py_ssize_t rows, Py_ssize_t n, float *norms)
{
    return look(x, rows, n, norms, 1, 0);
}

/* Memory answers several places at once: one alone would take a quarter longer. */
WIDEST static Seen look_around(const float *x, Py_ssize_t rows, Py_ssize_t n, float *norms, Py_ssize_t apart)
{
    return look(x, rows, n, norms, PLACES, apart);
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

/* Some rows, at one place or at several; rows of one value are looked at as one. */
static Seen some(const float *x, Py_ssize_t rows, Py_ssize_t n, float *norms, double *sums, Py_ssize_t apart)
{
    float whole;
    for (Py_ssize_t row = 0; n == 1 && row < rows; row++)
        norms[row] = fabsf(x[row]);
    Seen found = n == 1  ? look_here(x, 1, rows, &whole)
                 : apart ? look_around(x, rows, n, norms, apart)
                         : look_here(x, rows, n, norms);
    for (Py_ssize_t place = 0; sums && place < (apart ? PLACES : 1); place++) /* while they are near */
        for (Py_ssize_t row = place * apart; row < place * apart + rows; row++)
            total(x + row * n, n, sums + 2 * row);
    return found;
}

/* Blocks of about PIECE values are added in their order, so that the number of threads changes no bit. `blocks` has
   room for each of them. Where there are many, most are taken together with those at other places. */
static Seen walk(const float *x, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t block, Seen *blocks, float *norms,
                 double *sums, int threads)
{
    const Py_ssize_t share = n > 1 && rows / block >= 16 * PLACES ? rows / block / PLACES : 0;
    const Py_ssize_t rest = rows - PLACES * share * block, count = share + (rest + block - 1) / block;
    Seen all = NOTHING;
#pragma omp parallel for num_threads(threads)
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t row = i < share ? i * block : rows - rest + (i - share) * block;
        Py_ssize_t size = rows - row < block ? rows - row : block;
        blocks[i] = some(x + row * n, size, n, norms + row, sums ? sums + 2 * row : NULL, i < share ? share * block : 0);
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

/* Return memory for so many bytes, and where it lies. Small results share large pieces: each by itself, between the
   tensors of a training, would split what one of these has left, and the next tensor would lie in colder memory. */
static PyObject *room(Py_ssize_t size, char **where)
{
    static PyObject *piece;
    static char *start;
    static Py_ssize_t used;
    if (size > ROOM / 8) {
        PyObject *own = PyByteArray_FromStringAndSize(NULL, size);
        *where = own ? PyByteArray_AsString(own) : NULL;
        return own;
    }
    PyObject *full = NULL;
    if (!piece || used + size > ROOM) {
        PyObject *fresh = PyByteArray_FromStringAndSize(NULL, ROOM), *view = fresh ? PyMemoryView_FromObject(fresh) : NULL;
        Py_XDECREF(fresh); /* its view holds it, as what is taken from a piece holds that */
        if (!view)
            return NULL;
        full = piece, piece = view, start = PyByteArray_AsString(fresh), used = 0;
    }
    /* It is taken before Python allocates again, which may collect garbage and so let another thread in here. */
    PyObject *from = Py_NewRef(piece);
    const Py_ssize_t at = used;
    *where = start + at;
    used += (size + 63) / 64 * 64;
    PyObject *part = PySequence_GetSlice(from, at, at + size);
    Py_DECREF(from);
    Py_XDECREF(full);
    return part;
}

/* What `reduce` returns. */
static PyObject *reduced(const float *x, Py_ssize_t n, Py_ssize_t rows, int wanted, int threads)
{
    const Py_ssize_t block = n / rows < PIECE ? PIECE / (n / rows) : 1;
    Seen *blocks = PyMem_Malloc((size_t)(rows / block + 1) * sizeof(Seen)), all;
    char *lengths, *totals = NULL;
    double m2;
    PyObject *norms = room(rows * (Py_ssize_t)sizeof(float), &lengths);
    PyObject *sums = wanted ? room(rows * 2 * (Py_ssize_t)sizeof(double), &totals) : NULL;
    PyObject *result = NULL;
    if (!blocks || !norms || (wanted && !sums)) {
        PyErr_NoMemory();
    } else {
        Py_BEGIN_ALLOW_THREADS
        all = walk(x, rows, n / rows, block, blocks, (float *)lengths, (double *)totals, threads);
        m2 = spread(x, n, all, threads);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("OddddLO", norms, all.sum / (double)n, m2, (double)all.low, (double)all.high,
                               (long long)all.zeros, sums ? sums : Py_None);
    }
    PyMem_Free(blocks);
    Py_XDECREF(norms);
    Py_XDECREF(sums);
    return result;
}

/* What `count` returns. */
static PyObject *counted(const uint32_t *x, Py_ssize_t n, const Py_buffer *tables)
{
    const Py_ssize_t threads = tables->len / (Py_ssize_t)(CODES * TURNS * sizeof(uint32_t));
    if (threads < 1 || threads > 1024 || n > (Py_ssize_t)UINT32_MAX) { /* a counter has 32 bits */
        PyErr_SetString(PyExc_ValueError, "values or tables have not the right size");
        return NULL;
    }
    int64_t *counts = PyMem_Malloc(CODES * (sizeof(int64_t) + sizeof(uint16_t)));
    if (!counts)
        return PyErr_NoMemory();
    uint16_t *codes = (uint16_t *)(counts + CODES);
    Py_ssize_t listed;
    Py_BEGIN_ALLOW_THREADS
    listed = tally(x, n, tables->buf, (int)threads, codes, counts);
    Py_END_ALLOW_THREADS
    const size_t of_codes = (size_t)listed * sizeof(uint16_t), of_counts = (size_t)listed * sizeof(int64_t);
    char *first, *second;
    PyObject *found = room((Py_ssize_t)of_codes, &first), *often = room((Py_ssize_t)of_counts, &second), *result = NULL;
    if (found && often) {
        memcpy(first, codes, of_codes);
        memcpy(second, counts, of_counts);
        result = PyTuple_Pack(2, found, often);
    }
    Py_XDECREF(found);
    Py_XDECREF(often);
    PyMem_Free(counts);
    return result;
}

PyDoc_STRVAR(reduce_doc,
"reduce(values, rows, sums, threads) -> (norms, mean, m2, low, high, zeros, sums)\n\n"
"`values`: float32, of so many rows of equal length. `norms`: memory of float32 (rows,), each row's l2 norm. Of all\n"
"values: the mean, the sum of squared deviations from it, the smallest, the largest, and how many are zero. `sums`:\n"
"None, or where it is asked for, memory of float64 (rows, 2), each row's sum and sum of magnitudes.\n");

static PyObject *reduce(PyObject *self, PyObject *args)
{
    Py_buffer values;
    PyObject *result = NULL;
    Py_ssize_t rows;
    int sums, threads;
    if (!PyArg_ParseTuple(args, "y*npi:reduce", &values, &rows, &sums, &threads))
        return NULL;
    const Py_ssize_t n = values.len / (Py_ssize_t)sizeof(float);
    if (rows < 1 || n < rows || n % rows || threads < 1)
        PyErr_SetString(PyExc_ValueError, "values, rows and threads do not fit together");
    else
        result = reduced(values.buf, n, rows, sums, threads);
    PyBuffer_Release(&values);
    return result;
}

PyDoc_STRVAR(count_doc,
"count(values, tables) -> (codes, counts)\n\n"
"The upper 16 bits of float32 values that occur, in rising order, as memory of uint16, and how often each does, as\n"
"memory of int64. `tables`, uint32 (threads, 65536, 4), must hold zeros, and does again afterwards.\n");

static PyObject *count(PyObject *self, PyObject *args)
{
    Py_buffer values, tables;
    if (!PyArg_ParseTuple(args, "y*w*:count", &values, &tables))
        return NULL;
    PyObject *result = counted(values.buf, values.len / (Py_ssize_t)sizeof(uint32_t), &tables);
    PyBuffer_Release(&values);
    PyBuffer_Release(&tables);
    return result;
}

/* A tensor as DLPack describes it, and where a framework's type has the functions that do. Source:
   https://dmlc.github.io/dlpack/latest/c_api.html, DLTensor and DLPackExchangeAPI, since version 1.2. */
typedef struct {
    void *data;
    int32_t device, number, axes;
    uint8_t kind, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t offset;
} View;

typedef struct {
    uint32_t major, minor;
    void *older, *allocate, *share, *adopt;
    int (*view)(void *tensor, View *view);
    void *stream;
} Exchange;

enum { DLPACK = 1, CPU = 1, FLOAT = 2 };

/* How many values there are, if they are float32 in the host's memory, one behind the other; else 0. */
static Py_ssize_t dense(const View *view)
{
    int64_t n = 1;
    if (!view->data || view->device != CPU || view->kind != FLOAT || view->bits != 32 || view->lanes != 1)
        return 0;
    for (int axis = view->axes - 1; axis >= 0; n *= view->shape[axis--])
        if (view->strides && view->strides[axis] != n && view->shape[axis] != 1)
            return 0;
    return n <= (int64_t)UINT32_MAX ? (Py_ssize_t)n : 0;
}

/* Called with a gradient; `self` holds the arguments of `hook`. */
static PyObject *arrive(PyObject *self, PyObject *gradient)
{
    PyObject *taken, *otherwise, *type, *capsule, *tables, *facts, *module, *found, *counts = NULL, *entry = NULL;
    int sums, threads, single, most;
    View view;
    if (!PyArg_ParseTuple(self, "(OOOOiOi)OOii", &taken, &otherwise, &type, &capsule, &sums, &tables, &threads, &facts,
                          &module, &single, &most))
        return NULL;
    const Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!exchange)
        return NULL;
    const int seen = exchange->major == DLPACK && exchange->view && (PyObject *)Py_TYPE(gradient) == type &&
                     exchange->view(gradient, &view) == 0;
    const Py_ssize_t n = seen && 0 < view.axes && view.axes <= most ? dense(&view) : 0;
    PyObject *negative = n ? PyObject_CallMethod(gradient, "is_neg", NULL) : NULL; /* lazily: DLPack knows nothing of it */
    Py_XDECREF(negative);
    if (negative != Py_False) {
        PyErr_Clear();
        return PyObject_CallFunctionObjArgs(otherwise, facts, module, Py_None, gradient, NULL);
    }
    const Py_ssize_t samples = view.axes == single ? 1 : (Py_ssize_t)view.shape[0];
    const Py_ssize_t channels = view.axes == single ? (Py_ssize_t)view.shape[0]
                                : view.axes == 1    ? 1
                                                    : (Py_ssize_t)view.shape[1];
    const void *values = (const char *)view.data + view.offset;
    const int fair = n >> 15 < threads ? (int)(n >> 15) : threads, at_work = fair < 1 ? 1 : fair;
    found = sums < 0 ? Py_NewRef(Py_None) : reduced(values, n, samples * channels, sums, at_work);
    if (found && tables == Py_None) {
        counts = Py_NewRef(Py_None);
    } else if (found) {
        PyObject *room = PyObject_CallFunction(tables, "i", at_work < 8 ? at_work : 8);
        Py_buffer buffer;
        if (room && PyObject_GetBuffer(room, &buffer, PyBUF_CONTIG) == 0) {
            counts = counted(values, n, &buffer);
            PyBuffer_Release(&buffer);
        }
        Py_XDECREF(room);
    }
    if (counts)
        entry = Py_BuildValue("O(nnnOO)O", facts, samples, channels, n / samples / channels, found, counts, Py_None);
    const int failed = !entry || PyList_Append(taken, entry) < 0;
    Py_XDECREF(found);
    Py_XDECREF(counts);
    Py_XDECREF(entry);
    return failed ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef arriving = {"arrive", arrive, METH_O, "Called with a gradient."};

PyDoc_STRVAR(hook_doc,
"hook((taken, otherwise, type, exchange, sums, tables, threads), facts, module, single, most) -> callable\n\n"
"What it is called with is walked over where it is a `type` of dense float32 in the host's memory, of `most` axes at\n"
"most; `(facts, found, None)` is appended to `taken`, where `found` is `(samples, channels, space, reduced, counted)`.\n"
"`otherwise(facts, module, None, gradient)` is called with all else. `exchange`: the type's\n"
"`__dlpack_c_exchange_api__`. `sums`: whether rows are summed too; -1: nothing is reduced. `tables`: a function of a\n"
"number of threads that returns tables for `count`, or None. `single`: the number of axes where that of the samples is\n"
"missing.\n");

static PyObject *hook(PyObject *self, PyObject *args)
{
    PyObject *o;
    int i;
    if (!PyArg_ParseTuple(args, "(O!OOOiOi)OOii:hook", &PyList_Type, &o, &o, &o, &o, &i, &o, &i, &o, &o, &i, &i))
        return NULL;
    return PyCFunction_New(&arriving, args);
}

static PyMethodDef methods[] = {
    {"reduce", reduce, METH_VARARGS, reduce_doc},
    {"count", count, METH_VARARGS, count_doc},
    {"hook", hook, METH_VARARGS, hook_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "undertow._walk", "Walks over float32 values.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__walk(void)
{
    return PyModuleDef_Init(&module);
}
