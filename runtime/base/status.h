/* Status codes: the one result convention of the tree.
 *
 * A fallible function returns enum cm_status (0 = ok), is CM_MUST_USE, takes struct cm_error *err
 * last, and writes its outputs only on success. The class says who is at fault and what happens
 * next; the finer cause is the text id in struct cm_error ("CM-PKG-TAG"). */
#ifndef CASEMATE_RUNTIME_BASE_STATUS_H
#define CASEMATE_RUNTIME_BASE_STATUS_H

#define CM_MUST_USE          __attribute__((warn_unused_result))
#define CM_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

enum cm_status {
    CM_OK = 0,
    CM_E_USAGE,    /* wrong command line; exit 2 */
    CM_E_CONFIG,   /* wrong configuration file or value; exit 3 */
    CM_E_PACKAGE,  /* package or model file refused; exit 4 */
    CM_E_POLICY,   /* seal or policy refused the key; exit 5; the supervisor stays stopped */
    CM_E_TPM,      /* the TPM failed, is locked out or is another one; exit 6 */
    CM_E_EVIDENCE, /* evidence refused; exit 7 */
    CM_E_SANDBOX,  /* a restriction could not be applied; exit 8 */
    CM_E_SYSTEM,   /* the operating system said no: errno in subcode; exit 9 */
    CM_E_INPUT,    /* a client's input is wrong: answer the client, go on; exit 9 */
    CM_E_BUSY,     /* a bound is reached: retry later; exit 9 */
    CM_E_DEVICE,   /* the device failed: the worker is replaced; exit 9 */
    CM_E_BUG,      /* a broken assumption of ours; exit 70 */
    CM_STATUS_COUNT
};

/* Process exit code for a status (design: 0, 2..9, 70). Unknown values map to 70. */
int cm_status_exit_code(enum cm_status status);

/* Short lower-case word for a status ("package"); never NULL. */
const char *cm_status_name(enum cm_status status);

#endif
