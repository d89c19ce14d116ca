/* What every arm of the bench speaks, so that run.py can interleave them without loading again: a
 * line in, a line of JSON out.
 *
 *   prefill N          a prompt of N tokens into an empty context
 *   decode CONTEXT N   N single tokens behind a prompt of CONTEXT tokens
 *   streams S N        N steps of S sequences, one token each
 *
 * Tokens are the same in every arm: speed doesn't depend on them, but caches might. */
#ifndef CASEMATE_BENCH_ARM_H
#define CASEMATE_BENCH_ARM_H

#include <stdint.h>

#define ARM_CONTEXT      4608u
#define ARM_STREAMS      16u
#define ARM_STREAM_SPACE 512u /* positions of one of several streams */

/* Given by the arm. Sequence 0 has ARM_CONTEXT positions, 1 .. ARM_STREAMS ARM_STREAM_SPACE. */
/* Evaluate `count` tokens of a sequence from `position` on, whatever stood there before. */
void arm_prompt(uint32_t sequence, uint32_t position, const uint32_t *tokens, uint32_t count);
/* One token for each of sequences first .. first + count - 1, all at `position`. */
void arm_step(uint32_t first, uint32_t count, uint32_t position, uint32_t token);

/* Answers lines until the end of input. */
int arm_serve(uint32_t vocabulary);

#endif
