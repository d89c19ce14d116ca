/* Adapters: what shall be loaded, what is, and the one next step from there to here.
 *
 * <state>/adapters.table, which `casemate adapter` writes, says what shall be loaded; it is looked
 * at as the table of API keys is. Each takes a place, which is a region of the worker's device:
 *
 *   WAITING -> the keeper unseals its key -> UNSEALED -> the keeper hands the key out, the worker
 *   reads the file in chunks that we make -> LOADING -> SERVING
 *
 * and on its way out UNLOADING, until the worker has finished with it. A worker that is replaced
 * begins again at UNSEALED, a keeper at WAITING; of what the worker has meanwhile, a new keeper
 * unseals the key too, because evidence is its word: until it can name all, no quote is made.
 * What was REFUSED stays so, but for a reason that may pass: then it begins again at WAITING after
 * a while. One step at a time waits for an answer. The file itself is parsed by nobody here, and
 * its descriptor goes to nobody. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/cursor.h"
#include "runtime/base/sealed.h"
#include "runtime/supervisor/supervisor_internal.h"

#define TABLE_HEADER_BYTES 16u
#define AGAIN_FIRST_MS     2000u /* after a refusal for a passing reason; then twice as long … */
#define AGAIN_MOST_MS      256000u /* … up to this */

void adapters_init(struct service *service)
{
    for (uint32_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        service->adapters.each[i].fd = -1;
    }
}

static uint32_t places(const struct service *service)
{
    return (uint32_t)service->configuration->adapters_max;
}

static bool serving(const struct service *service, enum child_index index)
{
    const struct child *child = &service->children[index];
    return child->state == CHILD_SERVING && !child->drain_sent;
}

/* ------------------------------------------------------------------ what shall be */

static bool table_parse(struct adapters *adapters, const uint8_t *bytes, size_t size)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    const uint8_t *magic = cm_cursor_take(&cursor, 8);
    struct cm_adapter_row rows[CM_ADAPTERS_MAX];
    (void)cm_cursor_u64(&cursor); /* generation: for who writes it */
    size_t left = cm_cursor_left(&cursor), count = left / sizeof(rows[0]);
    if (!cm_cursor_ok(&cursor) || memcmp(magic, "CMADAP1", 8) != 0 || left % sizeof(rows[0]) != 0 ||
        count > CM_ADAPTERS_MAX) {
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        cm_cursor_copy(&cursor, &rows[i], sizeof(rows[i]));
        if (rows[i].serial == 0 || !cm_name_valid(rows[i].name) ||
            (i > 0 && strcmp(rows[i - 1].name, rows[i].name) >= 0)) {
            return false;
        }
    }
    memcpy(adapters->rows, rows, count * sizeof(rows[0]));
    adapters->row_count = (uint32_t)count;
    return true;
}

void adapters_refresh(struct service *service)
{
    struct adapters *adapters = &service->adapters;
    char path[CM_CONFIG_TEXT_BYTES + 32];
    uint8_t bytes[TABLE_HEADER_BYTES + CM_ADAPTERS_MAX * sizeof(struct cm_adapter_row) + 1];
    struct stat facts;
    if (places(service) == 0) {
        return;
    }
    snprintf(path, sizeof(path), "%s/adapters.table", service->state_path);
    int fd = file_look(path, &facts);
    if (adapters->known && file_same(&facts, &adapters->seen)) {
        if (fd >= 0) {
            close(fd);
        }
        return;
    }
    ssize_t got = fd >= 0 ? file_read(fd, bytes, sizeof(bytes), 0) : 0;
    if (fd >= 0) {
        close(fd);
    }
    adapters->seen = facts;
    adapters->known = true;
    if (fd < 0) {
        adapters->row_count = 0;
    } else if (got < 0 || !table_parse(adapters, bytes, (size_t)got)) {
        CM_LOG(&service->log, CM_LOG_ERROR, "adapters_refused",
               CM_LOG_S("text", "adapters.table is damaged: what is loaded stays until `casemate "
                                "adapter` writes it again"));
        return;
    }
    CM_LOG(&service->log, CM_LOG_INFO, "adapters", CM_LOG_I("wanted", adapters->row_count));
}

static bool wanted(const struct adapters *adapters, uint64_t serial)
{
    for (uint32_t i = 0; i < adapters->row_count; i++) {
        if (adapters->rows[i].serial == serial) {
            return true;
        }
    }
    return false;
}

static struct adapter *adapter_of(struct service *service, uint64_t serial)
{
    for (uint32_t i = 0; serial != 0 && i < CM_ADAPTERS_MAX; i++) {
        if (service->adapters.each[i].serial == serial) {
            return &service->adapters.each[i];
        }
    }
    return NULL;
}

/* ------------------------------------------------------------------ what is */

static uint32_t place_of(const struct service *service, const struct adapter *adapter)
{
    return (uint32_t)(adapter - service->adapters.each);
}

/* For the gateway, and the log. */
static void state_set(struct service *service, struct adapter *adapter, enum cm_adapter_state state)
{
    struct cm_adapter_info *info = &service->state.adapters[place_of(service, adapter)];
    adapter->state = state;
    if (state != CM_ADAPTER_SERVING && state != CM_ADAPTER_UNLOADING) {
        adapter->generation = 0;
    }
    if (state == CM_ADAPTER_SERVING || state == CM_ADAPTER_UNLOADING ||
        state == CM_ADAPTER_ABSENT) {
        CM_LOG(&service->log, CM_LOG_INFO, "adapter", CM_LOG_S("name", adapter->name),
               CM_LOG_S("state", cm_adapter_state_names[state]),
               CM_LOG_S("package", adapter->digest));
    }
    if (state == CM_ADAPTER_ABSENT) {
        *adapter = (struct adapter){.fd = -1};
    }
    *info = (struct cm_adapter_info){.state = (uint32_t)state, .generation = adapter->generation};
    memcpy(info->name, adapter->name, sizeof(info->name));
    if (state == CM_ADAPTER_REFUSED) {
        memcpy(info->id, adapter->why.id, sizeof(info->id));
    }
    service->state_dirty = true;
    status_write(service, clock_ms()); /* whoever asks now sees it */
    state_send(service, true);
}

/* It is there, or on its way in or out. */
static bool in_worker(const struct adapter *adapter)
{
    return adapter->state == CM_ADAPTER_LOADING || adapter->state == CM_ADAPTER_SERVING ||
           adapter->state == CM_ADAPTER_UNLOADING;
}

static void file_close(struct adapter *adapter)
{
    if (adapter->fd >= 0) {
        close(adapter->fd);
        adapter->fd = -1;
    }
}

static void key_close(struct service *service, struct adapter *adapter, enum cm_adapter_close how)
{
    const struct cm_adapter_step step = {
        .serial = adapter->serial, .place = place_of(service, adapter), .how = (uint32_t)how};
    if (adapter->key_held && serving(service, CHILD_KEEPER)) {
        frame_send(service, &service->children[CHILD_KEEPER], CM_FRAME_ADAPTER_CLOSE, &step,
                   sizeof(step), NULL, 0);
    }
    service->evidence_due =
        service->evidence_due || (adapter->key_held && how == CM_ADAPTER_CLOSE_FORGET);
    adapter->key_held = adapter->key_held && how != CM_ADAPTER_CLOSE_FORGET;
}

/* A bound that was reached, an I/O error, a TPM that did not answer: nothing of the adapter's own.
 */
static bool passes(const struct cm_error *why)
{
    return why->status == CM_E_BUSY || why->status == CM_E_SYSTEM || why->status == CM_E_TPM;
}

static void refuse(struct service *service, struct adapter *adapter, const struct cm_error *why)
{
    adapter->why = *why;
    cm_error_sanitise(&adapter->why);
    adapter->again_ms = 0;
    if (passes(why)) {
        uint64_t wait = (uint64_t)AGAIN_FIRST_MS << (adapter->refusals < 7 ? adapter->refusals : 7);
        adapter->again_ms = clock_ms() + (wait < AGAIN_MOST_MS ? wait : AGAIN_MOST_MS);
        adapter->refusals++;
    }
    cm_log_error(&service->log, "adapter_refused", &adapter->why);
    file_close(adapter);
    key_close(service, adapter, CM_ADAPTER_CLOSE_FORGET);
    state_set(service, adapter, CM_ADAPTER_REFUSED);
}

/* As refuse, but the worker may have it: then it is unloaded first. */
static void give_up(struct service *service, struct adapter *adapter, const struct cm_error *why)
{
    if (!in_worker(adapter)) {
        refuse(service, adapter, why);
        return;
    }
    adapter->why = *why;
    if (adapter->state != CM_ADAPTER_UNLOADING) {
        state_set(service, adapter, CM_ADAPTER_UNLOADING);
    }
}

static void asked(struct service *service, struct adapter *adapter, enum adapter_question question)
{
    service->adapters.question = question;
    service->adapters.asked = adapter;
    service->adapters.asked_ms = clock_ms();
}

/* Is this the answer to what was asked? Then the next thing may be. */
static bool answered(struct service *service, const struct adapter *adapter,
                     enum adapter_question question)
{
    bool is = adapter != NULL && service->adapters.asked == adapter &&
              service->adapters.question == question;
    if (is) {
        service->adapters.question = ADAPTER_ASK_NOTHING;
        service->adapters.asked = NULL;
    }
    return is;
}

/* ------------------------------------------------------------------ the next step */

static enum cm_status file_open(struct service *service, struct adapter *adapter,
                                struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + CM_NAME_BYTES + 32];
    struct stat facts;
    snprintf(path, sizeof(path), "%s/adapters/%s.cmpkg", service->state_path, adapter->name);
    file_close(adapter);
    adapter->fd = file_look(path, &facts);
    if (adapter->fd < 0) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-OPEN",
                            "cannot open %s: %s; `casemate adapter add` puts it there", path,
                            errno != 0 ? strerrordesc_np(errno) : "no regular file");
    }
    adapter->file_bytes = (uint64_t)facts.st_size;
    return CM_OK;
}

/* Head and policy list for the keeper, in a memfd that stands at its beginning: it may read, and
 * nothing else. */
static void key_unseal(struct service *service, struct adapter *adapter)
{
    char path[CM_CONFIG_TEXT_BYTES + CM_NAME_BYTES + 32];
    struct cm_adapter_open open_ = {.serial = adapter->serial, .place = place_of(service, adapter)};
    struct cm_error err;
    int memory = -1;
    snprintf(path, sizeof(path), "%s/adapters/%s.cmpkg", service->state_path, adapter->name);
    memcpy(open_.name, adapter->name, sizeof(open_.name));
    enum cm_status status = file_open(service, adapter, &err);
    if (status == CM_OK) {
        status = head_memfd_make(adapter->fd, path, &memory, &open_.head_bytes, &open_.policy_bytes,
                                 &err);
    }
    file_close(adapter);
    if (status == CM_OK) {
        snprintf(path, sizeof(path), "/proc/self/fd/%d", memory);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            status = cm_error_errno(&err, errno, "CM-SUP-MEMFD", "cannot open head memory again");
        } else {
            frame_send(service, &service->children[CHILD_KEEPER], CM_FRAME_ADAPTER_OPEN, &open_,
                       sizeof(open_), &fd, 1);
            asked(service, adapter, ADAPTER_ASK_OPEN);
            close(fd);
        }
    }
    if (memory >= 0) {
        close(memory);
    }
    if (status != CM_OK) {
        give_up(service, adapter, &err);
    }
}

static void key_ask(struct service *service, struct adapter *adapter)
{
    const struct cm_adapter_step step = {.serial = adapter->serial,
                                         .place = place_of(service, adapter)};
    frame_send(service, &service->children[CHILD_KEEPER], CM_FRAME_ADAPTER_KEY, &step, sizeof(step),
               NULL, 0);
    asked(service, adapter, ADAPTER_ASK_KEY);
}

static void unload_ask(struct service *service, struct adapter *adapter)
{
    const struct cm_adapter_step step = {.serial = adapter->serial,
                                         .place = place_of(service, adapter)};
    if (!adapter->unload_sent && serving(service, CHILD_WORKER)) {
        adapter->unload_sent = true;
        frame_send(service, &service->children[CHILD_WORKER], CM_FRAME_ADAPTER_UNLOAD, &step,
                   sizeof(step), NULL, 0);
    }
}

/* It is not wanted any more. What was asked about it is waited for. */
static void adapter_leave(struct service *service, struct adapter *adapter)
{
    switch (adapter->state) {
    case CM_ADAPTER_LOADING:
    case CM_ADAPTER_SERVING:
        if (service->adapters.asked == adapter && service->adapters.question == ADAPTER_ASK_OPEN) {
            break; /* a new keeper is about to hold its key, and must be told to forget it */
        }
        (void)answered(service, adapter, ADAPTER_ASK_LOAD);
        file_close(adapter);
        state_set(service, adapter, CM_ADAPTER_UNLOADING);
        break;
    case CM_ADAPTER_WAITING:
    case CM_ADAPTER_UNSEALED:
    case CM_ADAPTER_REFUSED:
        if (service->adapters.asked != adapter) {
            key_close(service, adapter, CM_ADAPTER_CLOSE_FORGET);
            state_set(service, adapter, CM_ADAPTER_ABSENT);
        }
        break;
    case CM_ADAPTER_ABSENT:
    case CM_ADAPTER_UNLOADING:
    case CM_ADAPTER_STATE_COUNT:
        break;
    }
}

static void row_place(struct service *service, const struct cm_adapter_row *row)
{
    for (uint32_t i = 0; i < places(service); i++) {
        struct adapter *adapter = &service->adapters.each[i];
        if (adapter->state == CM_ADAPTER_ABSENT) {
            adapter->serial = row->serial;
            memcpy(adapter->name, row->name, sizeof(adapter->name));
            state_set(service, adapter, CM_ADAPTER_WAITING);
            return;
        }
    }
}

void adapters_step(struct service *service)
{
    struct adapters *adapters = &service->adapters;
    for (uint32_t i = 0; i < places(service); i++) {
        struct adapter *adapter = &adapters->each[i];
        if (adapter->serial != 0 && !wanted(adapters, adapter->serial)) {
            adapter_leave(service, adapter);
        }
        if (adapter->state == CM_ADAPTER_UNLOADING) {
            unload_ask(service, adapter);
        }
        if (adapter->state == CM_ADAPTER_REFUSED && adapter->again_ms != 0 &&
            clock_ms() >= adapter->again_ms) {
            adapter->why = (struct cm_error){.status = CM_OK};
            state_set(service, adapter, CM_ADAPTER_WAITING);
        }
    }
    for (uint32_t i = 0; i < adapters->row_count; i++) {
        if (adapter_of(service, adapters->rows[i].serial) == NULL) {
            row_place(service, &adapters->rows[i]);
        }
    }
    for (uint32_t i = 0; i < places(service) && adapters->question == ADAPTER_ASK_NOTHING; i++) {
        struct adapter *adapter = &adapters->each[i];
        bool unknown = adapter->state == CM_ADAPTER_SERVING && !adapter->key_held;
        if ((adapter->state == CM_ADAPTER_WAITING || unknown) && serving(service, CHILD_KEEPER)) {
            key_unseal(service, adapter);
        } else if (adapter->state == CM_ADAPTER_UNSEALED && serving(service, CHILD_KEEPER) &&
                   serving(service, CHILD_WORKER)) {
            key_ask(service, adapter);
        }
    }
}

bool adapters_unsealed(const struct service *service)
{
    for (uint32_t i = 0; i < places(service); i++) {
        if (service->adapters.each[i].state == CM_ADAPTER_WAITING) {
            return false;
        }
    }
    return true;
}

bool adapters_told(const struct service *service)
{
    for (uint32_t i = 0; i < places(service); i++) {
        const struct adapter *adapter = &service->adapters.each[i];
        if (in_worker(adapter) && !adapter->key_held) {
            return false;
        }
    }
    return true;
}

bool adapters_key_out(const struct service *service)
{
    return service->adapters.question == ADAPTER_ASK_KEY;
}

bool adapters_stuck(const struct service *service, enum cm_role role, uint64_t now)
{
    bool by_worker = service->adapters.question == ADAPTER_ASK_LOAD;
    return service->adapters.question != ADAPTER_ASK_NOTHING &&
           role == (by_worker ? CM_ROLE_WORKER : CM_ROLE_KEEPER) &&
           now - service->adapters.asked_ms >= ANSWER_WAIT_MS;
}

/* ------------------------------------------------------------------ answers */

void on_adapter_answer(struct service *service)
{
    struct cm_adapter_answer answer;
    memcpy(&answer, service->frame.payload, sizeof(answer));
    struct adapter *adapter = adapter_of(service, answer.serial);
    if (answered(service, adapter, ADAPTER_ASK_OPEN) && answer.error.status == CM_OK) {
        adapter->key_held = true;
        service->evidence_due = true;
        if (!in_worker(adapter)) {
            state_set(service, adapter, CM_ADAPTER_UNSEALED);
        }
    } else if (adapter != NULL && answer.error.status != CM_OK) {
        (void)answered(service, adapter, ADAPTER_ASK_KEY);
        cm_error_sanitise(&answer.error);
        (void)cm_error_wrap(&answer.error, "adapter %s", adapter->name);
        give_up(service, adapter, &answer.error);
    }
}

/* The page goes on to the worker that there is; it is nobody's where there is none. */
void on_adapter_page(struct service *service)
{
    struct cm_adapter_step step;
    struct cm_error err;
    memcpy(&step, service->frame.payload, sizeof(step));
    struct adapter *adapter = adapter_of(service, step.serial);
    if (!answered(service, adapter, ADAPTER_ASK_KEY)) {
        return;
    }
    if (service->phase != SERVICE_RUN || !serving(service, CHILD_WORKER)) {
        key_close(service, adapter, CM_ADAPTER_CLOSE_UNUSED);
        return;
    }
    if (file_open(service, adapter, &err) != CM_OK) {
        key_close(service, adapter, CM_ADAPTER_CLOSE_UNUSED);
        refuse(service, adapter, &err);
        return;
    }
    struct cm_adapter_load load = {.serial = adapter->serial,
                                   .place = place_of(service, adapter),
                                   .file_bytes = adapter->file_bytes};
    memcpy(load.name, adapter->name, sizeof(load.name));
    state_set(service, adapter, CM_ADAPTER_LOADING);
    asked(service, adapter, ADAPTER_ASK_LOAD);
    frame_send(service, &service->children[CHILD_WORKER], CM_FRAME_ADAPTER_LOAD, &load,
               sizeof(load), service->frame.fds, 1);
}

/* Bytes of the file that is being loaded, and of no other. */
const char *on_adapter_read(struct service *service)
{
    static uint8_t bytes[CM_ADAPTER_CHUNK_BYTES];
    struct cm_adapter_chunk chunk;
    struct cm_error err = {.status = CM_OK};
    memcpy(&chunk, service->frame.payload, sizeof(chunk));
    struct adapter *adapter = adapter_of(service, chunk.serial);
    if (adapter == NULL || adapter->state != CM_ADAPTER_LOADING || adapter->fd < 0 ||
        service->phase != SERVICE_RUN || !serving(service, CHILD_WORKER)) {
        return NULL; /* it was taken back in the meantime */
    }
    if (chunk.bytes == 0 || chunk.bytes > sizeof(bytes) || chunk.offset > adapter->file_bytes ||
        chunk.bytes > adapter->file_bytes - chunk.offset) {
        return "bytes of an adapter that its file has not";
    }
    int fd = -1;
    if (file_read(adapter->fd, bytes, chunk.bytes, chunk.offset) == (ssize_t)chunk.bytes) {
        fd = cm_memfd_sealed("casemate-adapter", bytes, chunk.bytes);
    }
    if (fd < 0) {
        (void)cm_error_errno(&err, errno != 0 ? errno : EIO, "CM-PKG-READ",
                             "adapter %s: cannot read %u bytes at offset %llu", adapter->name,
                             chunk.bytes, (unsigned long long)chunk.offset);
        adapter->why = err;
        (void)answered(service, adapter, ADAPTER_ASK_LOAD);
        state_set(service, adapter, CM_ADAPTER_UNLOADING);
        return NULL;
    }
    service->adapters.asked_ms = clock_ms();
    frame_send(service, &service->children[CHILD_WORKER], CM_FRAME_ADAPTER_BYTES, &chunk,
               sizeof(chunk), &fd, 1);
    close(fd);
    return NULL;
}

const char *on_adapter_state(struct service *service)
{
    struct cm_adapter_told told;
    memcpy(&told, service->frame.payload, sizeof(told));
    struct adapter *adapter = adapter_of(service, told.serial);
    if (adapter == NULL ||
        (adapter->state != CM_ADAPTER_LOADING && adapter->state != CM_ADAPTER_UNLOADING)) {
        return NULL;
    }
    (void)answered(service, adapter, ADAPTER_ASK_LOAD);
    file_close(adapter);
    if (told.state == CM_ADAPTER_SERVING && adapter->state == CM_ADAPTER_LOADING) {
        if (memchr(told.digest, '\0', sizeof(told.digest)) == NULL || told.generation == 0) {
            return "an adapter that serves without a name or number";
        }
        snprintf(adapter->digest, sizeof(adapter->digest), "%.64s", told.digest);
        adapter->generation = told.generation;
        adapter->bytes = told.bytes;
        adapter->refusals = 0;
        key_close(service, adapter, CM_ADAPTER_CLOSE_WIPED);
        state_set(service, adapter, CM_ADAPTER_SERVING);
    } else if (told.state == CM_ADAPTER_REFUSED) {
        refuse(service, adapter, &told.error);
    } else if (told.state == CM_ADAPTER_ABSENT) {
        if (adapter->why.status != CM_OK) {
            refuse(service, adapter, &adapter->why);
        } else {
            key_close(service, adapter, CM_ADAPTER_CLOSE_FORGET);
            state_set(service, adapter, CM_ADAPTER_ABSENT);
        }
    }
    return NULL;
}

/* ------------------------------------------------------------------ losses */

void adapters_worker_lost(struct service *service)
{
    for (uint32_t i = 0; i < places(service); i++) {
        struct adapter *adapter = &service->adapters.each[i];
        (void)answered(service, adapter, ADAPTER_ASK_LOAD);
        file_close(adapter);
        adapter->unload_sent = false;
        if (adapter->state == CM_ADAPTER_UNLOADING) {
            key_close(service, adapter, CM_ADAPTER_CLOSE_FORGET);
            state_set(service, adapter, CM_ADAPTER_ABSENT);
        } else if (adapter->state == CM_ADAPTER_LOADING || adapter->state == CM_ADAPTER_SERVING) {
            state_set(service, adapter,
                      adapter->key_held ? CM_ADAPTER_UNSEALED : CM_ADAPTER_WAITING);
        }
    }
}

void adapters_keeper_lost(struct service *service)
{
    for (uint32_t i = 0; i < places(service); i++) {
        struct adapter *adapter = &service->adapters.each[i];
        (void)answered(service, adapter, ADAPTER_ASK_OPEN);
        (void)answered(service, adapter, ADAPTER_ASK_KEY);
        adapter->key_held = false;
        if (adapter->state == CM_ADAPTER_UNSEALED) {
            state_set(service, adapter, CM_ADAPTER_WAITING);
        }
    }
}
