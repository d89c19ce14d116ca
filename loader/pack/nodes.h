/* What the commands about nodes share: their records, their measurement, and small files. */
#ifndef CASEMATE_LOADER_PACK_NODES_H
#define CASEMATE_LOADER_PACK_NODES_H

#include "loader/pack/commands.h"
#include "loader/tpm/measure.h"

CM_MUST_USE enum cm_status cm_file_read(const char *path, uint8_t *bytes, size_t room,
                                        size_t *ret_size, struct cm_error *err);
/* Written beside, then renamed: a whole file or none. */
CM_MUST_USE enum cm_status cm_file_put(const char *path, const void *bytes, size_t size,
                                       unsigned mode, struct cm_error *err);
/* The certificates of a PEM file. Fails: USAGE CM-PACK-AUTHORITY. */
CM_MUST_USE enum cm_status cm_authorities_read(const char *path, struct cm_ek_authorities *ret,
                                               struct cm_error *err);
/* A node's record; with --ek-authority one of these must vouch for its TPM. Fails: POLICY. */
CM_MUST_USE enum cm_status cm_node_read(const struct cm_pack_arguments *arguments, const char *path,
                                        struct cm_enrolment *ret_enrolment, struct cm_error *err);
/* What nodes measure before the package. */
CM_MUST_USE enum cm_status cm_nodes_measurement_read(const char *path,
                                                     struct cm_measurement *ret_measurement,
                                                     struct cm_error *err);
/* Read a package's head, and add its event. */
CM_MUST_USE enum cm_status cm_package_measure(const char *package,
                                              struct cm_measurement *measurement,
                                              struct cm_package_head *ret_head,
                                              struct cm_error *err);

#endif
