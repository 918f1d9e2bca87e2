/* The chunk index of an HDF5 dataset, noted down by a function that H5Dchunk_iter calls without Python in between.
 *
 * The extension does not link HDF5: the library that h5py has loaded calls this function, which Python hands to it as
 * an address (mpi_kernels/formats/hdf5_index.py).  Its type is H5D_chunk_iter_op_t of H5Dpublic.h, HDF5 1.14 and later.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

#include "native.h"

/* What Python gives as op_data: four numbers of 64 bits. */
struct table {
    int64_t rank;     /* axes of the dataset, at most H5S_MAX_RANK */
    int64_t capacity; /* rows that there is room for */
    int64_t count;    /* rows written */
    int64_t *rows;    /* (capacity, rank + 3): offset of the chunk along each axis, filter mask, address, stored bytes */
};

static int note(const uint64_t *offset, unsigned mask, uint64_t address, uint64_t size, void *data)
{
    struct table *table = data;
    if (table->count >= table->capacity)
        return -1; /* H5_ITER_ERROR: the file holds more chunks than its shape has room for */
    int64_t *row = table->rows + table->count++ * (table->rank + 3);
    for (int64_t axis = 0; axis < table->rank; axis++)
        row[axis] = (int64_t)offset[axis];
    row[table->rank] = mask;
    row[table->rank + 1] = (int64_t)address;
    row[table->rank + 2] = (int64_t)size;
    return 0; /* H5_ITER_CONT */
}

static PyObject *chunk_callback(PyObject *self, PyObject *none)
{
    (void)self, (void)none;
    return PyLong_FromVoidPtr((void *)(uintptr_t)note);
}

static PyMethodDef methods[] = {
    {"chunk_callback", chunk_callback, METH_NOARGS,
     "Address of an H5D_chunk_iter_op_t; its op_data are int64 rank, capacity, count and the address of the rows."},
    {NULL, NULL, 0, NULL}};

int nat_register_chunks(PyObject *module);

int nat_register_chunks(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
