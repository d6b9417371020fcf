/* copy.c: y = x, for any two layouts.
 *
 * Bytes 8 an element, flops none: bound by memory. Where the elements of both lie side by side along one axis, a copy is
 * an elementwise kernel whose function is the identity. Where they do along two different axes, as in a transposition,
 * one of the two would be taken apart element by element. Then blocks of VL × VL are read along x's axis, turned over
 * in registers (transpose.h) and written along y's: whole vectors on both sides.
 *
 * A thread does ROWS × COLUMNS at a time: 16 runs of x that are long enough for the hardware to see them coming, to
 * one cache line of each of 512 rows of y. These lines are written whole, and in a large copy past the caches: to fetch
 * each one first, from a page of its own, took two thirds of the time (12.4 ms for 2048 × 3072, 3.9 without, where
 * memcpy takes 3.9; one thread of a Sapphire Rapids). */
#include "elementwise.h"
#include "transpose.h"

#define ROWS 512
#define COLUMNS 16
#define SIDE_BY_SIDE 8       /* elements along each of the two axes: with fewer, most of a block would be empty */

/* y[i·y_row + j] = x[i + j·x_row] for i < rows, j < columns, and so for every index of the other axes. */
struct turn {
    real *y;
    const real *x;
    int64_t rows, columns, y_row, x_row;
    int past_caches, axes;
    int64_t others, shape[MAX_AXES], y_step[MAX_AXES], x_step[MAX_AXES]; /* of the other axes, and how many indices */
};

/* The first `rows` × `columns` of a block; all of it where there are more. */
ALWAYS_INLINE void turn_block(real *y, int64_t y_row, const real *x, int64_t x_row, int64_t rows, int64_t columns,
                              int past_caches) {
    vf block[VL];
    load_turned(block, x, x_row, columns, rows);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
        if (past_caches)
            vf_stream(y + i * y_row, block[i]);
        else if (i < rows)
            store_up_to(y + i * y_row, block[i], columns);
}

static void turn_tile(const struct turn *t, real *y, const real *x, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += VL)
        for (int64_t j = 0; j < columns; j += VL) {
            real *to = y + i * t->y_row + j;
            const real *from = x + i + j * t->x_row;
            int whole = rows - i >= VL && columns - j >= VL;
            if (whole && t->past_caches)
                turn_block(to, t->y_row, from, t->x_row, VL, VL, 1);
            else if (whole)
                turn_block(to, t->y_row, from, t->x_row, VL, VL, 0);
            else
                turn_block(to, t->y_row, from, t->x_row, rows - i, columns - j, 0);
        }
}

/* Index: (other axes · tiles of rows + tile of rows) · tiles of columns + tile of columns. */
static void turn_tiles(void *context, int64_t begin, int64_t end) {
    const struct turn *t = context;
    int64_t across = divide_up(t->columns, COLUMNS), down = divide_up(t->rows, ROWS);
    for (int64_t n = begin; n < end; n++) {
        int64_t j = n % across * COLUMNS, i = n / across % down * ROWS, rest = n / across / down;
        real *y = t->y + i * t->y_row + j;
        const real *x = t->x + i + j * t->x_row;
        for (int axis = t->axes - 1; axis >= 0; rest /= t->shape[axis--]) {
            y += rest % t->shape[axis] * t->y_step[axis];
            x += rest % t->shape[axis] * t->x_step[axis];
        }
        turn_tile(t, y, x, at_most(t->rows - i, ROWS), at_most(t->columns - j, COLUMNS));
    }
    if (t->past_caches)
        vf_stream_end();
}

/* The axis along which an operand's elements lie side by side, or −1 if there is none that is long enough. */
static int dense_axis(int ndim, const int64_t *shape, const int64_t *strides) {
    for (int axis = 0; axis < ndim; axis++)
        if (strides[axis] == 1 && shape[axis] >= SIDE_BY_SIDE)
            return axis;
    return -1;
}

/* Whether the layout is a transposition, and which. */
static int find_turn(struct turn *t, real *y, const real *x, const int64_t *layout) {
    int ndim = (int)layout[0];
    const int64_t *shape = layout + 1, *y_strides = shape + ndim, *x_strides = y_strides + ndim;
    int along_y = dense_axis(ndim, shape, y_strides), along_x = dense_axis(ndim, shape, x_strides);
    if (along_y < 0 || along_x < 0 || along_y == along_x || x_strides[along_y] == 1)
        return 0;
    t->y = y, t->x = x, t->axes = 0, t->others = 1;
    t->rows = shape[along_x], t->columns = shape[along_y];
    t->y_row = y_strides[along_x], t->x_row = x_strides[along_y];
    int64_t unaligned = (int64_t)((uintptr_t)y / sizeof(real)) | t->y_row;
    for (int axis = 0; axis < ndim; axis++)
        if (axis != along_x && axis != along_y) {
            t->shape[t->axes] = shape[axis];
            t->y_step[t->axes] = y_strides[axis];
            t->x_step[t->axes++] = x_strides[axis];
            t->others *= shape[axis], unaligned |= y_strides[axis];
        }
    t->past_caches = goes_past_caches(2 * t->rows * t->columns * t->others) && unaligned % VL == 0;
    return 1;
}

static inline vf identity(vf x) { return x; }
UNARY_RUN(copy, identity)

KERNEL(copy)(real *y, const real *x, const int64_t *layout) {
    struct turn t;
    if (!find_turn(&t, y, x, layout)) {
        walk_layout(layout, 2, (void *const[]){y, (void *)x}, REAL_SIZES, copy_run);
        return;
    }
    int64_t tiles = divide_up(t.rows, ROWS) * divide_up(t.columns, COLUMNS);
    parallel_for(tiles * t.others, 1 + GRAIN / (1 + at_most(t.rows, ROWS) * at_most(t.columns, COLUMNS)), turn_tiles, &t);
}
