/* `casemate-pack pack` and `recover`: GGUF in, sealed package out; and the proof that it opens. */
#include "loader/pack/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "kernels/model.h"
#include "loader/pack/directory.h"
#include "loader/pack/owner.h"
#include "loader/pack/plan.h"
#include "loader/package/internal.h"
#include "loader/package/write.h"

struct progress {
    uint64_t done, total;
    double started, printed;
    bool terminal;
};

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Bytes, rate, time left: a line that rewrites itself on a terminal, else one each five seconds. */
static void progress_print(struct progress *progress, bool last)
{
    double now = seconds_now();
    if (!last && now - progress->printed < (progress->terminal ? 0.1 : 5.0)) {
        return;
    }
    if (last && !progress->terminal) {
        return;
    }
    double elapsed = now - progress->started;
    double rate = elapsed > 0 ? (double)progress->done / elapsed : 0;
    double left = rate > 0 ? (double)(progress->total - progress->done) / rate : 0;
    fprintf(stderr, "%spacking: %.1f of %.1f MB, %.1f MB/s, %.0f s left%s",
            progress->terminal ? "\r" : "", (double)progress->done / 1e6,
            (double)progress->total / 1e6, rate / 1e6, left,
            progress->terminal && !last ? "  " : "\n");
    progress->printed = now;
}

enum cm_status cm_command_keygen(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    enum cm_status status = cm_owner_make(arguments->owner, err);
    if (status == CM_OK && arguments->json) {
        printf("{\"owner\": \"%s/owner.pub\", \"policy\": \"%s/policy.pub\"}\n", arguments->owner,
               arguments->owner);
    } else if (status == CM_OK) {
        printf(
            "made %s/owner.key (signs packages) and %s/policy.key (signs policies): keep both off "
            "the nodes.\nnodes pin %s/owner.pub and %s/policy.pub\n",
            arguments->owner, arguments->owner, arguments->owner, arguments->owner);
    }
    return status;
}

static enum cm_status matrices_parse(const char *name, uint32_t *ret_kind, struct cm_error *err)
{
    if (name == NULL || strcmp(name, "u8") == 0) {
        *ret_kind = CM_TENSOR_NONE;
    } else if (strcmp(name, "bf16") == 0) {
        *ret_kind = CM_TENSOR_BF16;
    } else {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-MATRICES",
                            "--matrices '%s' is unknown; there are: u8, bf16", name);
    }
    return CM_OK;
}

/* Convert and append each tensor, with the zeros between them. */
static enum cm_status payload_write(const struct cm_plan *plan, struct cm_package_writer *writer,
                                    struct cm_convert_loss *total, struct cm_error *err)
{
    static const uint8_t zeros[4096];
    struct progress progress = {.total = plan->payload_bytes,
                                .started = seconds_now(),
                                .terminal = isatty(STDERR_FILENO) == 1};
    progress.printed = progress.started;
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < plan->manifest.tensor_count; i++) {
        const struct cm_manifest_tensor *tensor = &plan->manifest.tensors[i];
        struct cm_convert_loss loss;
        status =
            cm_package_write_append(writer, zeros, (size_t)(tensor->offset - progress.done), err);
        uint8_t *bytes = malloc((size_t)tensor->bytes);
        if (status == CM_OK && bytes == NULL) {
            status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tensor %.*s",
                                    (int)tensor->name.size, tensor->name.bytes);
        }
        if (status == CM_OK) {
            status = cm_plan_convert(plan, i, bytes, &loss, err);
        }
        if (status == CM_OK) {
            status = cm_package_write_append(writer, bytes, (size_t)tensor->bytes, err);
            total->error_square += loss.error_square;
            total->square += loss.square;
            total->exact = total->exact && loss.exact;
        }
        free(bytes);
        progress.done = tensor->offset + tensor->bytes;
        progress_print(&progress, false);
    }
    progress_print(&progress, true);
    return status;
}

static void summary_print(const struct cm_pack_arguments *arguments, const struct cm_plan *plan,
                          const struct cm_convert_loss *loss, double seconds)
{
    double relative = loss->square > 0 ? sqrt(loss->error_square / loss->square) : 0;
    const struct cm_manifest *m = &plan->manifest;
    if (arguments->json) {
        json_t *facts =
            json_pack("{s:s, s:s, s:i, s:I, s:b, s:f, s:f, s:i, s:f}", "package", arguments->out,
                      "model", plan->name, "tensors", (int)m->tensor_count, "payload_bytes",
                      (json_int_t)plan->payload_bytes, "exact", loss->exact, "relative_rms_error",
                      relative, "kl_divergence", (double)m->loss_divergence, "kl_positions",
                      (int)m->loss_positions, "seconds", seconds);
        json_dumpf(facts, stdout, JSON_INDENT(2));
        printf("\n");
        json_decref(facts);
        return;
    }
    printf("%s: model %s, %u layers, %u tensors, %.1f MB of weights, %.1f s\n", arguments->out,
           plan->name, m->layers, m->tensor_count, (double)plan->payload_bytes / 1e6, seconds);
    if (loss->exact) {
        printf("weights are carried over exactly\n");
    } else {
        printf(
            "some weights were rounded: relative RMS error %.6f over the whole, mean KL %.6f over "
            "%u positions\n",
            relative, (double)m->loss_divergence, m->loss_positions);
    }
}

static enum cm_status package_write(const struct cm_plan *plan, const struct cm_pack_seal *seal,
                                    struct cm_convert_loss *ret_loss, struct cm_error *err)
{
    struct cm_package_writer *writer = NULL;
    enum cm_status status =
        cm_package_write_begin(&seal->options, cm_secret_view(seal->key), &plan->manifest,
                               plan->payload_bytes, &writer, err);
    if (status == CM_OK) {
        status = payload_write(plan, writer, ret_loss, err);
        if (status == CM_OK) {
            status = cm_package_write_finish(writer, err);
        } else {
            cm_package_write_abort(writer);
        }
    }
    return status;
}

struct input { /* a file or a directory */
    struct cm_gguf *gguf;
    struct cm_directory *directory;
};

static enum cm_status input_plan(const char *path, const struct cm_plan_options *options,
                                 struct input *input, struct cm_plan *plan, struct cm_error *err)
{
    struct stat facts;
    if (stat(path, &facts) == 0 && S_ISDIR(facts.st_mode)) {
        enum cm_status status = cm_directory_open(path, &input->directory, err);
        return status == CM_OK ? cm_directory_plan(input->directory, options, plan, err) : status;
    }
    enum cm_status status = cm_gguf_open(path, &input->gguf, err);
    return status == CM_OK ? cm_plan_make(input->gguf, options, plan, err) : status;
}

enum cm_status cm_command_pack(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    struct input input = {NULL, NULL};
    struct cm_plan plan = {.payload_bytes = 0};
    struct cm_pack_seal seal = {.key = NULL};
    struct cm_convert_loss loss = {.exact = true};
    double started = seconds_now();
    struct cm_plan_options options = {.name = arguments->name,
                                      .chat_format = arguments->chat_format,
                                      .default_system = arguments->default_system,
                                      .origin = arguments->input};
    enum cm_status status = cm_pack_seal_check(arguments, err);
    if (status == CM_OK) {
        status = matrices_parse(arguments->matrices, &options.floats_kind, err);
    }
    if (status == CM_OK) {
        status = input_plan(arguments->input, &options, &input, &plan, err);
    }
    if (status == CM_OK && !cm_plan_exact(&plan)) {
        status =
            cm_plan_loss(&plan, &plan.manifest.loss_divergence, &plan.manifest.loss_positions, err);
    }
    if (status == CM_OK) {
        status = cm_pack_seal_begin(arguments, &seal, err);
    }
    if (status == CM_OK) {
        status = package_write(&plan, &seal, &loss, err);
    }
    if (status == CM_OK) {
        status = cm_pack_seal_finish(arguments, &seal, err);
    }
    if (status == CM_OK) {
        summary_print(arguments, &plan, &loss, seconds_now() - started);
    }
    cm_pack_seal_done(&seal);
    cm_plan_done(&plan);
    cm_gguf_close(input.gguf);
    cm_directory_close(input.directory);
    return status;
}

static enum cm_status segments_check(const struct cm_package *package, int fd, struct cm_error *err)
{
    const struct cm_package_core *core = &cm_package_head_of(package)->core;
    uint8_t *ciphertext = malloc(core->segment_bytes);
    struct cm_secret *plaintext = NULL;
    enum cm_status status = ciphertext != NULL
                                ? cm_secret_new(core->segment_bytes, &plaintext, err)
                                : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "a segment");
    for (uint64_t i = 0; status == CM_OK && i < core->segment_count; i++) {
        uint64_t offset;
        size_t bytes;
        cm_package_segment_place(package, i, &offset, &bytes);
        status = cm_read_exact(fd, ciphertext, bytes, offset, "payload", err);
        if (status == CM_OK) {
            status = cm_package_segment_open(package, i, ciphertext, bytes,
                                             cm_secret_bytes(plaintext), err);
        }
    }
    cm_secret_free(plaintext);
    free(ciphertext);
    return status;
}

enum cm_status cm_command_recover(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    static struct cm_package_head head;
    struct cm_secret *key = NULL;
    struct cm_package *package = NULL;
    int fd = open(arguments->input, O_RDONLY | O_CLOEXEC);
    enum cm_status status = cm_recovery_open(arguments, fd, &head, &key, err);
    if (status == CM_OK) {
        status = cm_package_open(fd, cm_secret_view(key), head.core.owner_key, &package, err);
    }
    if (status == CM_OK) {
        status = segments_check(package, fd, err);
    }
    if (status == CM_OK) {
        printf(arguments->json ? "{\"opens\": true}\n"
                               : "%s opens with this recovery file: every segment is authentic\n",
               arguments->input);
    }
    cm_package_close(package);
    cm_secret_free(key);
    if (fd >= 0) {
        close(fd);
    }
    return status;
}
