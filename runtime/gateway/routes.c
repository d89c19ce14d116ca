/* The route table. */
#include "runtime/gateway/routes.h"

#include <string.h>

#define OPEN    CM_PERMISSION_OPEN
#define KEY     CM_PERMISSION_KEY
#define METRICS CM_PERMISSION_METRICS

/* Indexed by enum cm_handler, so that a counter per route needs no search. */
const struct cm_route cm_routes[CM_ROUTE_COUNT] = {
    [CM_HANDLER_CHAT] = {"POST", "/v1/chat/completions", KEY, CM_HANDLER_CHAT, true, true,
                         "a reply to a conversation"},
    [CM_HANDLER_COMPLETIONS] = {"POST", "/v1/completions", KEY, CM_HANDLER_COMPLETIONS, true, true,
                                "the continuation of a text"},
    [CM_HANDLER_MODELS] = {"GET", "/v1/models", KEY, CM_HANDLER_MODELS, false, true,
                           "the served model, and with it as `parent` those of its adapters that "
                           "the key may use; 503 until it is servable"},
    [CM_HANDLER_MODEL] = {"GET", "/v1/models/", KEY, CM_HANDLER_MODEL, false, true,
                          "one model by its id"},
    [CM_HANDLER_LIVEZ] = {"GET", "/livez", OPEN, CM_HANDLER_LIVEZ, false, false,
                          "event loop and worker are alive"},
    [CM_HANDLER_READYZ] = {"GET", "/readyz", OPEN, CM_HANDLER_READYZ, false, false,
                           "requests are accepted; else reason codes"},
    [CM_HANDLER_STARTUPZ] = {"GET", "/startupz", OPEN, CM_HANDLER_STARTUPZ, false, false,
                             "phase, percent, elapsed time and stages of the load"},
    [CM_HANDLER_HEALTH] = {"GET", "/health", OPEN, CM_HANDLER_HEALTH, false, false,
                           "as /readyz, for tools that expect this name"},
    [CM_HANDLER_VERSION] = {"GET", "/version", OPEN, CM_HANDLER_VERSION, false, false,
                            "version of the program"},
    [CM_HANDLER_METRICS] = {"GET", "/metrics", METRICS, CM_HANDLER_METRICS, false, false,
                            "Prometheus text format 0.0.4"},
    [CM_HANDLER_ATTESTATION] = {"GET", "/v1/attestation", OPEN, CM_HANDLER_ATTESTATION, false, true,
                                "`?nonce=` 64 hex digits: evidence for this connection, binary; "
                                "`casemate-verify` reads it"},
};

static bool path_matches(const struct cm_route *route, struct cm_span path,
                         struct cm_span *ret_parameter)
{
    size_t size = strlen(route->path);
    if (route->path[size - 1] != '/') {
        return cm_span_is(path, route->path);
    }
    if (path.size <= size || memcmp(path.at, route->path, size) != 0) {
        return false;
    }
    *ret_parameter = (struct cm_span){path.at + size, path.size - size};
    return memchr(ret_parameter->at, '/', ret_parameter->size) == NULL;
}

int cm_route_find(struct cm_span method, struct cm_span path, const struct cm_route **ret_route,
                  struct cm_span *ret_parameter, const char **ret_allow)
{
    for (size_t i = 0; i < CM_ROUTE_COUNT; i++) {
        struct cm_span parameter = {"", 0};
        if (!path_matches(&cm_routes[i], path, &parameter)) {
            continue;
        }
        if (!cm_span_is(method, cm_routes[i].method)) {
            *ret_allow = cm_routes[i].method; /* no path has two methods; a test holds that */
            return 405;
        }
        *ret_route = &cm_routes[i];
        *ret_parameter = parameter;
        return 200;
    }
    return 404;
}
