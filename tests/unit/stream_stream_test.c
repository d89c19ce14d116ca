/* Loading under faults: every way a file, a disk or a device can fail ends with a wiped device and
 * the fault's own name; what reads slowly or in pieces loads all the same. */
#include <errno.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>

#include "kernels/cpu/cpu_internal.h"
#include "loader/stream/stream_internal.h"
#include "tests/unit/package_sample.h"

#define SEGMENT CM_PACKAGE_SEGMENT_BYTES
/* Two runs of 16 and a rest of 9 whole segments (hashed in lanes) and 2 with a short one. */
#define PAYLOAD_LARGE (43 * (uint64_t)SEGMENT - 12288)
#define PAYLOAD_SMALL (3 * (uint64_t)SEGMENT + 4096)

static struct sample sample;
static struct cm_error err;
static struct cm_package *package;
static struct cm_stream_source source;
static struct cm_device *device;
static int fd;

static const struct cm_model model = {.vocabulary = 64,
                                      .width = 64,
                                      .layers = 1,
                                      .heads = 2,
                                      .kv_heads = 1,
                                      .head_width = 32,
                                      .rope_width = 32,
                                      .ffn_width = 64,
                                      .context_max = 32,
                                      .rope_base = 10000,
                                      .norm_epsilon = 1e-5f,
                                      .tied_head = true};

static void device_begin(uint64_t payload_bytes)
{
    const struct cm_device_options options = {.threads = 1};
    const struct cm_device_reserve reserve = {.model = &model,
                                              .payload_bytes = payload_bytes,
                                              .segment_bytes = SEGMENT,
                                              .slots = 1,
                                              .kv_pages = 1,
                                              .context_max = 32,
                                              .step_tokens_max = 32};
    cr_assert_eq(cm_device_open("cpu", &options, &device, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_device_reserve(device, &reserve, &err), CM_OK, "%s", err.text);
}

static void begin(uint64_t payload_bytes)
{
    sample_make(&sample, CM_SUITE_AES_256_GCM, payload_bytes, "m.cmpkg");
    fd = open(sample.path, O_RDWR | O_CLOEXEC);
    cr_assert_eq(cm_package_open(fd, sample.key, sample.owner_key, &package, &err), CM_OK, "%s",
                 err.text);
    cm_stream_package_source(package, fd, &source);
    device_begin(payload_bytes);
}

static void end(void)
{
    cm_device_close(device);
    cm_package_close(package);
    close(fd);
}

static enum cm_status load(uint32_t threads)
{
    const struct cm_stream_options options = {.threads = threads};
    struct cm_stream_times times;
    return cm_stream_run(&source, device, &options, &times, &err);
}

/* Not a byte of the payload, and no way on but close. */
static void wiped_assert(const char *when)
{
    for (uint64_t i = 0; i < device->arena_bytes; i++) {
        cr_assert_eq(device->arena[i], 0, "%s: byte %llu of the arena", when,
                     (unsigned long long)i);
    }
    cr_assert_eq(cm_device_load_finish(device, &err), CM_E_BUG, "%s", when);
}

Test(stream, loads_every_size_on_any_number_of_threads)
{
    static const uint64_t sizes[] = {4096,           SEGMENT,         SEGMENT + 4096, PAYLOAD_SMALL,
                                     8ull * SEGMENT, 16ull * SEGMENT, PAYLOAD_LARGE};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (uint32_t threads = 0; threads <= 3; threads++) {
            begin(sizes[i]);
            cr_assert_eq(load(threads), CM_OK, "%s", err.text);
            cr_assert_eq(memcmp(device->payload, sample.payload, sizes[i]), 0, "%llu bytes",
                         (unsigned long long)sizes[i]);
            end();
        }
    }
    sample_done(&sample);
}

/* Pages of the payload in the page cache. */
static size_t pages_cached(void)
{
    static unsigned char cached[PAYLOAD_LARGE / 4096];
    const size_t count = (size_t)source.payload_bytes / 4096;
    size_t sum = 0;
    void *map =
        mmap(NULL, source.payload_bytes, PROT_READ, MAP_SHARED, fd, (off_t)source.payload_offset);
    cr_assert_neq(map, MAP_FAILED);
    cr_assert_eq(mincore(map, source.payload_bytes, cached), 0);
    cr_assert_eq(munmap(map, source.payload_bytes), 0);
    for (size_t i = 0; i < count; i++) {
        sum += cached[i] & 1u;
    }
    return sum;
}

Test(stream, a_payload_too_large_to_keep_leaves_the_page_cache)
{
    struct statfs facts;
    begin(PAYLOAD_LARGE);
    cr_assert_eq(fstatfs(fd, &facts), 0);
    if (facts.f_type == TMPFS_MAGIC) {
        cr_skip_test("a file of tmpfs lives in the page cache");
    }
    cr_assert_eq(fdatasync(fd), 0); /* what is not written yet stays */
    cr_assert_eq(load(2), CM_OK, "%s", err.text);
    cr_assert_gt(pages_cached(), PAYLOAD_LARGE / 4096 / 4 * 3, "within the bound it stays");
    end();
    begin(PAYLOAD_LARGE);
    cr_assert_eq(fdatasync(fd), 0);
    source.keep_bytes_max = PAYLOAD_LARGE - 1;
    cr_assert_eq(load(2), CM_OK, "%s", err.text);
    cr_assert_lt(pages_cached(), PAYLOAD_LARGE / 4096 / 4);
    end();
    sample_done(&sample);
}

/* ------------------------------------------------------------------ reads that go wrong */

static _Atomic uint32_t reads;
static uint32_t fault_at;

static ssize_t read_pieces(int file, void *bytes, size_t size, off_t offset)
{
    if (atomic_fetch_add(&reads, 1) % 5 == 3) {
        errno = EINTR;
        return -1;
    }
    return pread(file, bytes, size < 70001 ? size : 70001, offset);
}

static ssize_t read_error(int file, void *bytes, size_t size, off_t offset)
{
    if (atomic_fetch_add(&reads, 1) == fault_at) {
        errno = EIO;
        return -1;
    }
    return pread(file, bytes, size, offset);
}

Test(stream, short_and_interrupted_reads_are_continued)
{
    begin(PAYLOAD_LARGE);
    source.read = read_pieces;
    cr_assert_eq(load(2), CM_OK, "%s", err.text);
    cr_assert_eq(memcmp(device->payload, sample.payload, PAYLOAD_LARGE), 0);
    end();
    sample_done(&sample);
}

Test(stream, a_disk_error_at_any_read_wipes)
{
    for (fault_at = 0; fault_at < 3; fault_at++) {
        begin(PAYLOAD_LARGE);
        reads = 0;
        source.read = read_error;
        cr_assert_eq(load(1 + fault_at % 2), CM_E_SYSTEM);
        cr_assert_str_eq(err.id, "CM-PKG-READ");
        cr_assert_eq(err.subcode, EIO);
        wiped_assert("EIO");
        end();
    }
    sample_done(&sample);
}

Test(stream, a_file_that_is_cut_while_loading_wipes)
{
    static const uint64_t cuts[] = {0, 5000, 20ull * SEGMENT, PAYLOAD_LARGE - 1};
    for (size_t i = 0; i < sizeof(cuts) / sizeof(cuts[0]); i++) {
        begin(PAYLOAD_LARGE);
        cr_assert_eq(ftruncate(fd, (off_t)(source.payload_offset + cuts[i])), 0);
        cr_assert_eq(load(2), CM_E_PACKAGE);
        cr_assert_str_eq(err.id, "CM-PKG-LENGTH");
        wiped_assert("cut");
        end();
    }
    sample_done(&sample);
}

/* ------------------------------------------------------------------ bytes that are wrong */

/* Exchange two segments, or turn one bit, in the file; its place is named. */
static void segments_swap(uint64_t a, uint64_t b)
{
    static uint8_t first[SEGMENT], second[SEGMENT];
    off_t at = (off_t)(source.payload_offset + a * SEGMENT),
          to = (off_t)(source.payload_offset + b * SEGMENT);
    cr_assert(pread(fd, first, SEGMENT, at) == SEGMENT &&
              pread(fd, second, SEGMENT, to) == SEGMENT);
    cr_assert(pwrite(fd, second, SEGMENT, at) == SEGMENT &&
              pwrite(fd, first, SEGMENT, to) == SEGMENT);
}

Test(stream, exchanged_segments_are_refused_by_their_hash)
{
    static const uint64_t pairs[][2] = {{0, 1}, {3, 30}, {15, 16}, {33, 40}, {40, 41}};
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
        begin(PAYLOAD_LARGE);
        segments_swap(pairs[i][0], pairs[i][1]);
        cr_assert_eq(load(2), CM_E_PACKAGE, "pair %zu", i);
        cr_assert_str_eq(err.id, "CM-PKG-HASH");
        wiped_assert("swapped");
        end();
    }
    sample_done(&sample);
}

Test(stream, a_turned_bit_in_any_segment_is_refused_by_name)
{
    for (uint64_t i = 0; i < 43; i += i < 30 ? 7 : 1) {
        char name[40];
        uint8_t byte;
        begin(PAYLOAD_LARGE);
        off_t at = (off_t)(source.payload_offset + i * SEGMENT + i * 991);
        cr_assert_eq(pread(fd, &byte, 1, at), 1);
        byte ^= 0x10;
        cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
        cr_assert_eq(load(1), CM_E_PACKAGE);
        snprintf(name, sizeof(name), "segment %llu at", (unsigned long long)i);
        cr_assert_not_null(strstr(err.text, name), "%s", err.text);
        wiped_assert("bit");
        end();
    }
    sample_done(&sample);
}

/* ------------------------------------------------------------------ parts that fail */

static _Atomic uint32_t decrypts;

static enum cm_status decrypt_fails(void *context, uint64_t index, const uint8_t *ciphertext,
                                    size_t bytes, uint8_t *plaintext, struct cm_error *failure)
{
    if (atomic_fetch_add(&decrypts, 1) == fault_at) {
        return cm_error_set(failure, CM_E_PACKAGE, "CM-PKG-TAG", "planted");
    }
    return cm_package_segment_decrypt(context, index, ciphertext, bytes, plaintext, failure);
}

Test(stream, a_cipher_that_fails_late_wipes_what_was_open)
{
    for (fault_at = 0; fault_at < 43; fault_at += 21) {
        begin(PAYLOAD_LARGE);
        decrypts = 0;
        source.decrypt = decrypt_fails;
        cr_assert_eq(load(2), CM_E_PACKAGE);
        cr_assert_str_eq(err.text, "planted");
        wiped_assert("cipher");
        end();
    }
    sample_done(&sample);
}

Test(stream, a_device_that_refuses_ends_the_load)
{
    begin(PAYLOAD_LARGE);
    device->segment_seen[20] = 1; /* as if it had come before */
    cr_assert_eq(load(2), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-DEV-SEGMENT");
    wiped_assert("device");
    end();
    sample_done(&sample);
}

static volatile int stop;

static void stop_halfway(void *context, uint64_t done, uint64_t total)
{
    (void)context;
    stop = stop != 0 || done * 3 > total;
}

Test(stream, a_stopped_load_wipes)
{
    const struct cm_stream_options options = {
        .threads = 1, .progress = stop_halfway, .stop = &stop};
    struct cm_stream_times times;
    begin(PAYLOAD_LARGE);
    cr_assert_eq(cm_stream_run(&source, device, &options, &times, &err), CM_E_BUSY);
    cr_assert_str_eq(err.id, "CM-STREAM-STOP");
    wiped_assert("stopped");
    end();
    sample_done(&sample);
}

static uint64_t said[64], said_count;

static void progress_note(void *context, uint64_t done, uint64_t total)
{
    cr_assert_eq(context, &said_count);
    cr_assert_eq(total, PAYLOAD_LARGE);
    said[said_count++ % 64] = done;
}

Test(stream, progress_rises_to_the_whole_and_is_said_by_the_caller)
{
    const struct cm_stream_options options = {
        .threads = 2, .progress = progress_note, .progress_context = &said_count};
    struct cm_stream_times times;
    begin(PAYLOAD_LARGE);
    cr_assert_eq(cm_stream_run(&source, device, &options, &times, &err), CM_OK);
    cr_assert_geq(said_count, 1u);
    for (uint64_t i = 1; i < said_count; i++) {
        cr_assert_geq(said[i], said[i - 1]);
    }
    cr_assert_eq(said[said_count - 1], PAYLOAD_LARGE);
    cr_assert_eq(times.bytes, PAYLOAD_LARGE);
    end();
    sample_done(&sample);
}
