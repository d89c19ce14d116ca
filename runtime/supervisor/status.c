/* run/status.json: what `casemate status` shows. Written each second, and once more at the end. */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

struct page {
    char text[24576];
    size_t used;
};

CM_PRINTF(2, 3) static void put(struct page *page, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int size = vsnprintf(page->text + page->used, sizeof(page->text) - page->used, format, args);
    va_end(args);
    CM_ASSERT(size >= 0 && (size_t)size < sizeof(page->text) - page->used);
    page->used += (size_t)size;
}

/* "name": "text", with what JSON does not bear escaped or replaced. */
static void put_text(struct page *page, const char *name, const char *text)
{
    put(page, "\"%s\": \"", name);
    for (; *text != '\0'; text++) {
        char byte = (unsigned char)*text < ' ' ? '?' : *text;
        put(page, byte == '"' || byte == '\\' ? "\\%c" : "%c", byte);
    }
    put(page, "\"");
}

static const char *truth(bool value)
{
    return value ? "true" : "false";
}

static uint64_t resident_bytes(pid_t pid)
{
    char path[64];
    char text[128];
    unsigned long long total = 0;
    unsigned long long resident = 0;
    snprintf(path, sizeof(path), "/proc/%d/statm", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return 0;
    }
    ssize_t got = read(fd, text, sizeof(text) - 1);
    close(fd);
    text[got > 0 ? got : 0] = '\0';
    if (sscanf(text, "%llu %llu", &total, &resident) != 2) {
        return 0;
    }
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

static void head_put(struct page *page, const struct service *service)
{
    const struct cm_loaded *loaded = &service->loaded;
    put(page, "{");
    put_text(page, "version", CASEMATE_VERSION);
    put(page, ", \"pid\": %d, \"ready\": %s, \"draining\": %s, ", (int)service->pid,
        truth(service->state.ready == 1), truth(service->state.draining == 1));
    put_text(page, "reason", service->state.reason);
    put(page, ",\n ");
    put_text(page, "listen", service->address);
    put(page, ", ");
    put_text(page, "model_name", service->configuration->model_name);
    put(page, ", ");
    put_text(page, "package", service->configuration->package);
    put(page, ", ");
    put_text(page, "device", service->configuration->device);
    put(page, ",\n ");
    put_text(page, "tpm", service->configuration->tpm);
    put(page, ", ");
    put_text(page, "attest_mode", cm_config_attest_mode(service->configuration));
    put(page, ", \"keys\": {\"generation\": %llu, \"count\": %u},\n",
        (unsigned long long)service->keys_info.generation, service->keys_info.count);
    put(page,
        " \"load\": {\"stage\": %u, \"bytes\": %llu, \"read_us\": %llu, \"verify_us\": %llu, "
        "\"decrypt_us\": %llu, \"total_us\": %llu, \"arena_locked\": %s, ",
        service->state.load.stage, (unsigned long long)loaded->bytes,
        (unsigned long long)loaded->read_us, (unsigned long long)loaded->verify_us,
        (unsigned long long)loaded->decrypt_us, (unsigned long long)loaded->total_us,
        truth(loaded->arena_locked == 1));
    put_text(page, "weights", weights_word(service));
    put(page, "},\n");
}

static void roles_put(struct page *page, struct service *service)
{
    static const char *const states[] = {"absent", "starting", "serving", "killed"};
    static const size_t places[CHILD_COUNT] = {1, 3, 2, 4}; /* in cm_state.resident_bytes */
    uint64_t now = clock_ms();
    service->state.resident_bytes[0] = resident_bytes(service->pid);
    put(page,
        " \"roles\": {\n  \"supervisor\": {\"pid\": %d, \"state\": \"serving\", \"restarts\": 0, "
        "\"resident_bytes\": %llu}",
        (int)service->pid, (unsigned long long)service->state.resident_bytes[0]);
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        struct child *child = &service->children[i];
        bool waits = child->state == CHILD_ABSENT && child->due_ms > now;
        child->resident_bytes = child->pid != 0 ? resident_bytes(child->pid) : 0;
        service->state.resident_bytes[places[i]] = child->resident_bytes;
        put(page,
            ",\n  \"%s\": {\"pid\": %d, \"state\": \"%s\", \"restarts\": %u, \"generation\": %u, "
            "\"start_ms\": %llu, \"due_ms\": %llu, \"probed\": %u, \"resident_bytes\": %llu}",
            child->name, (int)child->pid, states[child->state], child->restarts, child->generation,
            (unsigned long long)(child->ready_ms != 0 ? child->ready_ms - child->started_ms : 0),
            (unsigned long long)(waits ? child->due_ms - now : 0), child->probed,
            (unsigned long long)child->resident_bytes);
    }
    put(page, "},\n");
}

/* What this machine lacks of the sandbox, in words. */
static void sandbox_put(struct page *page, const struct service *service)
{
    const char *comma = "";
    put(page, " \"sandbox\": {\"require\": \"%s\", \"lacks\": [",
        service->configuration->require_sandbox);
    for (uint32_t i = 0; i < CM_LAYER_COUNT; i++) {
        if ((service->sandbox.missing & CM_LAYER_BIT(i)) != 0) {
            put(page, "%s\"%s\"", comma, cm_layer_name((enum cm_confine_layer)i));
            comma = ", ";
        }
    }
    put(page, "]},\n");
}

static void adapters_put(struct page *page, const struct service *service)
{
    const char *comma = "";
    put(page, " \"adapters_max\": %llu, \"adapters\": [",
        (unsigned long long)service->configuration->adapters_max);
    for (uint32_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        const struct adapter *adapter = &service->adapters.each[i];
        if (adapter->serial == 0) {
            continue;
        }
        put(page, "%s\n  {", comma);
        put_text(page, "name", adapter->name);
        put(page, ", \"serial\": %llu, \"state\": \"%s\", \"bytes\": %llu, ",
            (unsigned long long)adapter->serial, cm_adapter_state_names[adapter->state],
            (unsigned long long)adapter->bytes);
        put_text(page, "package", adapter->digest);
        put(page, ", ");
        put_text(page, "id", adapter->state == CM_ADAPTER_REFUSED ? adapter->why.id : "");
        put(page, ", ");
        put_text(page, "text", adapter->state == CM_ADAPTER_REFUSED ? adapter->why.text : "");
        put(page, "}");
        comma = ",";
    }
    put(page, "],\n");
}

/* Oldest first. */
static void ends_put(struct page *page, const struct service *service)
{
    uint64_t first = service->end_count > END_RECORDS ? service->end_count - END_RECORDS : 0;
    put(page, " \"ends_total\": %llu, \"ends\": [", (unsigned long long)service->end_count);
    for (uint64_t at = first; at < service->end_count; at++) {
        const struct end_record *record = &service->ends[at % END_RECORDS];
        put(page, "%s\n  {\"unix_s\": %lld, \"role\": \"%s\", \"end\": \"%s\", \"id\": \"%s\", ",
            at > first ? "," : "", (long long)record->unix_s, record->name,
            cm_role_ends[record->end].word, cm_role_ends[record->end].id);
        put(page,
            "\"pid\": %d, \"generation\": %u, \"%s\": %d, \"served\": %s, \"life_ms\": %llu, ",
            (int)record->pid, record->generation, record->by_signal ? "signal" : "exit_code",
            record->code, truth(record->served), (unsigned long long)record->life_ms);
        put_text(page, "cause", record->cause);
        put(page, ", ");
        put_text(page, "text", record->text);
        put(page, ", ");
        put_text(page, "next", cm_role_ends[record->end].next);
        put(page, "}");
    }
    put(page, "],\n");
}

/* Present once nothing runs any more: a file without it belongs to a service that runs, or that was
 * itself killed. */
static void last_word_put(struct page *page, const struct service *service)
{
    if (!service->over) {
        return;
    }
    put(page, " \"over\": {\"exit_code\": %d, ",
        cm_status_exit_code((enum cm_status)service->end.status));
    put_text(page, "id", service->end.status == CM_OK ? "" : service->end.id);
    put(page, ", ");
    put_text(page, "text", service->end.status == CM_OK ? "stopped" : service->end.text);
    put(page, "},\n");
}

void status_write(struct service *service, uint64_t now_ms)
{
    static struct page page;
    page.used = 0;
    service->status_written_ms = now_ms;
    head_put(&page, service);
    roles_put(&page, service);
    sandbox_put(&page, service);
    ends_put(&page, service);
    last_word_put(&page, service);
    adapters_put(&page, service);
    put(&page, " \"not_yet\": [\"guard: learned tiers\", \"GPU backend\"]}\n");
    service->state_dirty = true; /* the gateway's metrics show resident bytes */
    run_file_write(service, "status.json", page.text, page.used);
}
