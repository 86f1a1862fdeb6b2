/*
RoPE backward: the gradient of the turned numbers, turned back.

    (dx1, dx2) -> (dx1 cos + dx2 sin, dx2 cos - dx1 sin)

A turn's transpose is the turn by the opposite angle: the sine changes its sign, and that is the whole backward pass. Nothing of
the forward pass is needed but the tables; in place, the gradient of the queries and keys as attention leaves it becomes that of
the projection's output. Apart: dq, dk and dv are gathered into rows.

Bytes, ideas and limits are those of rope_forward.cu, which has the kernels of both. llmc's kernel takes the sign as a number
(direction * sin, one product for each angle a thread reads); here it is known to the compiler, and costs nothing.
*/
#define ROPE_DIRECTION -1
#include "rope_forward.cu"
