/* Back-off and budget; ring views; head memory; the table of API keys. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "loader/package/package.h"
#include "runtime/base/ring.h"
#include "runtime/supervisor/supervisor_internal.h"

static struct service service;
static struct cm_configuration configuration;
static struct cm_error err;

Test(supervisor_child, delays_double_and_are_spread_between_half_and_whole)
{
    struct backoff least = {.death_count = 0};
    struct backoff most = {.death_count = 0};
    uint64_t base = 100;
    for (uint64_t i = 0; i < 20; i++, base = base * 2 < 30000 ? base * 2 : 30000) {
        uint64_t low = 0, high = 0;
        uint64_t now = (i + 1) * 40000; /* slow enough for the budget, too fast to be healthy */
        cr_assert(backoff_next(&least, now - 1000, now, 0, &low));
        cr_assert(backoff_next(&most, now - 1000, now, (uint32_t)(base / 2), &high));
        cr_assert_eq(low, base / 2);
        cr_assert_eq(high, base);
    }
}

Test(supervisor_child, the_sixth_death_within_a_minute_is_the_last)
{
    struct backoff backoff = {.death_count = 0};
    uint64_t delay;
    for (uint64_t i = 0; i < 5; i++) {
        cr_assert(backoff_next(&backoff, 0, 1000 + i, 0, &delay));
    }
    struct backoff later = backoff;
    cr_assert_not(backoff_next(&backoff, 0, 1000 + 59999, 0, &delay));
    cr_assert(backoff_next(&later, 2000, 1000 + 60000, 0, &delay));
}

Test(supervisor_child, a_healthy_minute_resets_the_delay)
{
    struct backoff backoff = {.death_count = 0};
    uint64_t delay;
    cr_assert(backoff_next(&backoff, 0, 10, 0, &delay));
    cr_assert(backoff_next(&backoff, 10, 20, 0, &delay));
    cr_assert_eq(delay, 100);
    cr_assert(backoff_next(&backoff, 20, 60020, 0, &delay));
    cr_assert_eq(delay, 50);
}

Test(supervisor_child, the_kernel_is_believed_before_the_role)
{
    struct child said = {.error_set = true, .ready_ms = 5};
    struct child ours = {.state = CHILD_KILLED, .kill = CM_ROLE_END_WATCHDOG, .ready_ms = 5};
    struct child stopped = {.stop_sent = true, .ready_ms = 5};
    struct child serving = {.ready_ms = 5}, starting = {.ready_ms = 0};
    const struct row {
        struct child *child;
        int code, status;
        bool memory;
        enum cm_role_end wanted;
    } rows[] = {
        {&said, CLD_KILLED, SIGSYS, false, CM_ROLE_END_POLICY},
        {&ours, CLD_DUMPED, SIGSYS, false, CM_ROLE_END_POLICY},
        {&ours, CLD_KILLED, SIGKILL, true, CM_ROLE_END_WATCHDOG},
        {&ours, CLD_KILLED, SIGSEGV, false, CM_ROLE_END_SIGNAL},
        {&serving, CLD_KILLED, SIGKILL, true, CM_ROLE_END_MEMORY},
        {&serving, CLD_KILLED, SIGKILL, false, CM_ROLE_END_SIGNAL},
        {&serving, CLD_KILLED, SIGTERM, true, CM_ROLE_END_SIGNAL},
        {&stopped, CLD_EXITED, 0, false, CM_ROLE_END_STOPPED},
        {&stopped, CLD_EXITED, 1, false, CM_ROLE_END_FAILED},
        {&said, CLD_EXITED, 0, false, CM_ROLE_END_FAILED},
        {&serving, CLD_EXITED, 0, false, CM_ROLE_END_EXIT},
        {&starting, CLD_EXITED, 0, false, CM_ROLE_END_START},
        {&starting, CLD_EXITED, 4, false, CM_ROLE_END_START},
        {&starting, CLD_KILLED, SIGSEGV, false, CM_ROLE_END_SIGNAL},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        siginfo_t how = {.si_code = rows[i].code};
        how.si_status = rows[i].status;
        cr_assert_eq(end_judge(rows[i].child, &how, rows[i].memory), rows[i].wanted, "row %zu", i);
    }
    for (size_t i = 0; i < CM_ROLE_END_COUNT; i++) {
        cr_assert(cm_role_ends[i].word != NULL && strncmp(cm_role_ends[i].id, "CM-END-", 7) == 0);
        for (size_t j = 0; j < i; j++) {
            cr_assert_str_neq(cm_role_ends[i].word, cm_role_ends[j].word);
            cr_assert_str_neq(cm_role_ends[i].id, cm_role_ends[j].id);
        }
    }
}

static bool writable(int fd)
{
    void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        return false;
    }
    munmap(at, 4096);
    return true;
}

Test(supervisor_child, each_side_writes_its_own_data_and_cursor_and_nothing_else)
{
    struct ring_set rings;
    int gateway[CM_RING_FD_COUNT], worker[CM_RING_FD_COUNT];
    cr_assert_eq(rings_make(CM_RING_CAPACITY_MIN, &rings, &err), CM_OK);
    rings_view_gateway(&rings, gateway);
    rings_view_worker(&rings, worker);
    const bool gateway_writes[4] = {true, false, false, true};
    for (size_t i = 0; i < 4; i++) {
        cr_assert_eq(writable(gateway[i]), gateway_writes[i], "gateway %zu", i);
        cr_assert_eq(writable(worker[i]), !gateway_writes[i], "worker %zu", i);
        cr_assert(fcntl(gateway[i], F_GETFD) & FD_CLOEXEC);
    }
    struct cm_ring out = {0}, in = {0};
    cr_assert_eq(cm_ring_open_producer(&out, gateway[0], gateway[1], &err), CM_OK);
    cr_assert_eq(cm_ring_open_consumer(&in, worker[0], worker[1], &err), CM_OK);
    cm_ring_close(&out);
    cm_ring_close(&in);
    cr_assert_eq(cm_ring_open_producer(&out, worker[2], worker[3], &err), CM_OK);
    cr_assert_eq(cm_ring_open_consumer(&in, gateway[2], gateway[3], &err), CM_OK);
    rings_close(&rings);
    cr_assert_neq(rings_make(1000, &rings, &err), CM_OK);
}

static void file_put(const char *path, const void *bytes, size_t size)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    cr_assert_eq(write(fd, bytes, size), (ssize_t)size);
    close(fd);
}

static void service_prepare(void)
{
    memset(&service, 0, sizeof(service));
    service.log = (struct cm_log){open("/dev/null", O_WRONLY), "supervisor", CM_LOG_ERROR};
    service.configuration = &configuration;
    service.keys_fd = -1;
    strcpy(service.state_path, "/tmp/casemate-sup-XXXXXX");
    cr_assert_not_null(mkdtemp(service.state_path));
}

Test(supervisor_child, the_key_table_is_taken_whole_or_nobody_is_admitted)
{
    struct table {
        char magic[8];
        uint64_t generation;
        struct cm_api_key rows[2];
    } table = {"CMKEYS2", 7, {{.id = {1}, .name = "a"}, {.id = {2}, .name = "b"}}};
    char path[CM_CONFIG_TEXT_BYTES + 16];
    service_prepare();
    snprintf(path, sizeof(path), "%s/keys.table", service.state_path);
    cr_assert(keys_refresh(&service), "no table: nobody");
    cr_assert_eq(service.keys_info.count, 0u);
    cr_assert_not(keys_refresh(&service), "unchanged");
    file_put(path, &table, sizeof(table));
    cr_assert(keys_refresh(&service));
    cr_assert_eq(service.keys_info.count, 2u);
    cr_assert_eq(service.keys_info.generation, 7u);
    int seals = fcntl(service.keys_fd, F_GET_SEALS);
    cr_assert(seals & F_SEAL_WRITE);
    cr_assert_not(keys_refresh(&service));
    struct table broken = table;
    broken.rows[1].id[0] = 1; /* twice the same id */
    unlink(path);
    file_put(path, &broken, sizeof(broken));
    cr_assert(keys_refresh(&service));
    cr_assert_eq(service.keys_info.count, 0u);
    file_put(path, &table, sizeof(table) - 1);
    cr_assert(keys_refresh(&service));
    cr_assert_eq(service.keys_info.count, 0u);
    broken = table;
    memset(broken.rows[0].name, 'x', sizeof(broken.rows[0].name)); /* not terminated */
    unlink(path);
    file_put(path, &broken, sizeof(broken));
    cr_assert(keys_refresh(&service));
    cr_assert_eq(service.keys_info.count, 0u);
    unlink(path);
    rmdir(service.state_path);
}

Test(supervisor_child, the_head_is_passed_on_with_the_policy_behind_it)
{
    static uint8_t bytes[CM_PACKAGE_HEAD_BYTES + 100];
    char path[64] = "/tmp/casemate-head-XXXXXX";
    char policy[80];
    int memory = -1;
    uint32_t head_bytes = 0, policy_bytes = 1;
    int fd = mkstemp(path);
    snprintf(policy, sizeof(policy), "%s.policy", path);
    memset(bytes, 3, sizeof(bytes));
    cr_assert_eq(write(fd, bytes, CM_PACKAGE_HEAD_BYTES - 1), CM_PACKAGE_HEAD_BYTES - 1);
    cr_assert_eq(head_memfd_make(fd, path, &memory, &head_bytes, &policy_bytes, &err),
                 CM_E_PACKAGE);
    cr_assert_eq(write(fd, bytes, 1), 1);
    cr_assert_eq(head_memfd_make(fd, path, &memory, &head_bytes, &policy_bytes, &err), CM_OK);
    cr_assert_eq(policy_bytes, 0u);
    close(memory);
    file_put(policy, "policy", 6);
    cr_assert_eq(write(fd, bytes, 100), 100);
    cr_assert_eq(head_memfd_make(fd, path, &memory, &head_bytes, &policy_bytes, &err), CM_OK);
    cr_assert_eq(head_bytes, CM_PACKAGE_HEAD_BYTES);
    cr_assert_eq(policy_bytes, 6u);
    char tail[8] = "";
    cr_assert_eq(pread(memory, tail, sizeof(tail), CM_PACKAGE_HEAD_BYTES), 6);
    cr_assert_str_eq(tail, "policy");
    cr_assert_eq(write(memory, "x", 1), -1, "sealed");
    unlink(path);
    unlink(policy);
}

/* The role at the other end of a child's channel. */
static struct cm_channel role_behind(enum child_index index, enum cm_role role)
{
    struct child *child = &service.children[index];
    struct cm_channel behind;
    int ends[2];
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
    child->role = role;
    child->name = "role";
    child->state = CHILD_SERVING;
    cm_channel_init(&child->channel, ends[0], CM_ROLE_SUPERVISOR, role);
    cm_channel_init(&behind, ends[1], role, CM_ROLE_SUPERVISOR);
    child->channel.phase = behind.phase = CM_PHASE_SERVE;
    return behind;
}

static bool frame_came(struct cm_channel *channel, enum cm_frame_type type)
{
    static struct cm_frame frame;
    bool came = cm_channel_receive(channel, &frame, &err) == CM_OK;
    cr_assert(!came || frame.type == type, "frame %u", frame.type);
    return came;
}

/* Evidence names the adapters whose keys the keeper holds: as long as the worker may have another,
 * neither a client nor the service itself gets a quote. */
Test(supervisor_child, no_quote_while_the_keeper_does_not_know_an_adapter)
{
    const struct cm_quote_request request = {.id = 5};
    service_prepare();
    configuration.adapters_max = 2;
    struct cm_channel keeper = role_behind(CHILD_KEEPER, CM_ROLE_KEEPER);
    struct cm_channel gateway = role_behind(CHILD_GATEWAY, CM_ROLE_GATEWAY);
    for (uint32_t state = 0; state < CM_ADAPTER_STATE_COUNT; state++) {
        for (int held = 0; held < 2; held++) {
            bool there = state == CM_ADAPTER_LOADING || state == CM_ADAPTER_SERVING ||
                         state == CM_ADAPTER_UNLOADING;
            bool wanted = held == 1 || !there;
            service.adapters.each[1].state = state;
            service.adapters.each[1].key_held = held == 1;
            service.client_quote = 0;
            memcpy(service.frame.payload, &request, sizeof(request));
            on_quote(&service);
            cr_assert_eq(frame_came(&keeper, CM_FRAME_QUOTE), wanted, "state %u", state);
            cr_assert_eq(frame_came(&gateway, CM_FRAME_QUOTE_FAILED), !wanted, "state %u", state);
            service.quote_pending = false;
            service.loaded.bytes = 1;
            evidence_tick(&service, clock_ms());
            cr_assert_eq(frame_came(&keeper, CM_FRAME_QUOTE), wanted, "own, state %u", state);
        }
    }
    close(keeper.fd);
    close(gateway.fd);
}
