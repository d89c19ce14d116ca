/* API keys: SQLite holds the truth; keys.table is the extract that the supervisor hands on.
 *
 * A key is shown once and kept as SHA-256 of its whole text: 256 random bits need no slow hash.
 * keys.lock is held around every change, so that an older table never replaces a newer one. */
#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "runtime/base/hex.h"
#include "runtime/cli/cli_internal.h"

struct key_store {
    sqlite3 *db;
    int lock_fd;
    char path[CM_CONFIG_TEXT_BYTES + 16];
    char table_path[CM_CONFIG_TEXT_BYTES + 16];
};

static const char schema[] =
    "CREATE TABLE IF NOT EXISTS keys (id BLOB PRIMARY KEY CHECK (length(id) = 8),"
    " hash BLOB NOT NULL CHECK (length(hash) = 32), name TEXT NOT NULL,"
    " created_unix_s INTEGER NOT NULL, expires_unix_s INTEGER NOT NULL,"
    " revoked_unix_s INTEGER NOT NULL DEFAULT 0, adapters TEXT NOT NULL DEFAULT 'none');"
    "CREATE TABLE IF NOT EXISTS meta (one INTEGER PRIMARY KEY CHECK (one = 1),"
    " generation INTEGER NOT NULL);"
    "INSERT OR IGNORE INTO meta VALUES (1, 0);";
/* A store of before keys had grants. */
static const char column_missing[] =
    "SELECT count(*) = 0 FROM pragma_table_info('keys') WHERE name = 'adapters'";
static const char column_add[] =
    "ALTER TABLE keys ADD COLUMN adapters TEXT NOT NULL DEFAULT 'none'";

static enum cm_status database_refuse(struct key_store *store, const char *what,
                                      struct cm_error *err)
{
    return cm_error_set(err, CM_E_SYSTEM, "CM-CLI-KEYS", "cannot %s the key store %.300s: %s", what,
                        store->path, sqlite3_errmsg(store->db));
}

void key_store_close(struct key_store *store)
{
    if (store == NULL) {
        return;
    }
    sqlite3_close(store->db);
    if (store->lock_fd >= 0) {
        close(store->lock_fd);
    }
    free(store);
}

static int64_t integer_query(struct key_store *store, const char *sql)
{
    sqlite3_stmt *query = NULL;
    int64_t value = -1;
    if (sqlite3_prepare_v2(store->db, sql, -1, &query, NULL) == SQLITE_OK &&
        sqlite3_step(query) == SQLITE_ROW) {
        value = sqlite3_column_int64(query, 0);
    }
    sqlite3_finalize(query);
    return value;
}

static bool schema_make(struct key_store *store)
{
    if (sqlite3_exec(store->db, schema, NULL, NULL, NULL) != SQLITE_OK) {
        return false;
    }
    int64_t missing = integer_query(store, column_missing);
    return missing == 0 ||
           (missing == 1 && sqlite3_exec(store->db, column_add, NULL, NULL, NULL) == SQLITE_OK);
}

enum cm_status key_store_open(const char *state, struct key_store **ret_store, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 16];
    struct key_store *store = calloc(1, sizeof(*store));
    CM_ASSERT(store != NULL);
    snprintf(store->table_path, sizeof(store->table_path), "%s/keys.table", state);
    snprintf(path, sizeof(path), "%s/keys.lock", state);
    store->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (store->lock_fd < 0 || flock(store->lock_fd, LOCK_EX) != 0) {
        cm_error_errno(err, errno, "CM-CLI-KEYS", "cannot open %s", path);
        key_store_close(store);
        return CM_E_SYSTEM;
    }
    cli_owner_follow(path);
    mode_t before = umask(077);
    snprintf(store->path, sizeof(store->path), "%s/keys.sqlite", state);
    int opened = sqlite3_open(store->path, &store->db);
    umask(before);
    if (opened != SQLITE_OK || !schema_make(store)) {
        database_refuse(store, "open", err);
        key_store_close(store);
        return CM_E_SYSTEM;
    }
    cli_owner_follow(store->path);
    *ret_store = store;
    return CM_OK;
}

/* "none", "all", or names with commas between them, into a row. */
static bool grants_read(const char *text, struct cm_api_key *row)
{
    row->adapter_count = strcmp(text, "all") == 0 ? CM_API_KEY_EVERY_ADAPTER : 0;
    if (row->adapter_count != 0 || strcmp(text, "none") == 0) {
        return true;
    }
    for (const char *at = text;; at++) {
        size_t size = strcspn(at, ",");
        if (row->adapter_count == CM_ADAPTERS_MAX || size >= CM_NAME_BYTES) {
            return false;
        }
        char *name = row->adapters[row->adapter_count++];
        memcpy(name, at, size);
        name[size] = '\0';
        at += size;
        if (!cm_name_valid(name) || *at == '\0') {
            return cm_name_valid(name);
        }
    }
}

static enum cm_status grants_check(const char *text, struct cm_error *err)
{
    struct cm_api_key row = {.name = {0}};
    return grants_read(text, &row)
               ? CM_OK
               : cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                              "--adapters %.80s: expected all, none, or at most %u names of "
                              "adapters with commas between them",
                              text, CM_ADAPTERS_MAX);
}

/* Rows that admit somebody, in order of id, behind the header {magic, generation}. */
static enum cm_status table_fill(struct key_store *store, uint8_t *bytes, size_t *ret_bytes,
                                 struct cm_error *err)
{
    sqlite3_stmt *query = NULL;
    size_t count = 0;
    int step = SQLITE_ERROR;
    int64_t generation = integer_query(store, "SELECT generation FROM meta");
    struct cm_api_key *rows = (struct cm_api_key *)(void *)(bytes + 16);
    memcpy(bytes, "CMKEYS2", 8);
    memcpy(bytes + 8, &generation, 8);
    if (generation < 0 ||
        sqlite3_prepare_v2(store->db,
                           "SELECT id, hash, expires_unix_s, name, adapters FROM keys WHERE "
                           "revoked_unix_s = 0 ORDER BY id",
                           -1, &query, NULL) != SQLITE_OK) {
        return database_refuse(store, "read", err);
    }
    while ((step = sqlite3_step(query)) == SQLITE_ROW && count < CM_API_KEYS_MAX) {
        struct cm_api_key *row = &rows[count++];
        memcpy(row->id, sqlite3_column_blob(query, 0), sizeof(row->id));
        memcpy(row->hash, sqlite3_column_blob(query, 1), sizeof(row->hash));
        row->expires_unix_s = (uint64_t)sqlite3_column_int64(query, 2);
        snprintf(row->name, sizeof(row->name), "%s", (const char *)sqlite3_column_text(query, 3));
        if (!grants_read((const char *)sqlite3_column_text(query, 4), row)) {
            row->adapter_count = 0;
        }
    }
    sqlite3_finalize(query);
    if (step != SQLITE_DONE) {
        return database_refuse(store, "read", err);
    }
    *ret_bytes = 16 + count * sizeof(struct cm_api_key);
    return CM_OK;
}

enum cm_status key_store_publish(struct key_store *store, struct cm_error *err)
{
    size_t used = 0;
    uint8_t *bytes = calloc(1, 16 + CM_API_KEYS_MAX * sizeof(struct cm_api_key));
    CM_ASSERT(bytes != NULL);
    enum cm_status status = table_fill(store, bytes, &used, err);
    if (status == CM_OK) {
        status = cli_file_write(store->table_path, bytes, used, 0600, err);
    }
    free(bytes);
    return status;
}

static void base64url(const uint8_t bytes[static 32], char ret_text[static 44])
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    size_t used = 0;
    for (size_t i = 0; i < 32; i += 3) {
        uint32_t bits = (uint32_t)bytes[i] << 16 | (uint32_t)bytes[i + 1] << 8 |
                        (i + 2 < 32 ? bytes[i + 2] : 0u);
        for (int shift = 18; shift >= 0 && used < 43; shift -= 6) {
            ret_text[used++] = digits[bits >> shift & 63];
        }
    }
    ret_text[43] = '\0';
}

static bool hash_make(const char *text, uint8_t ret_hash[static CM_DIGEST_BYTES])
{
    unsigned size = 0;
    return EVP_Digest(text, strlen(text), ret_hash, &size, EVP_sha256(), NULL) == 1;
}

static enum cm_status key_insert(struct key_store *store, const uint8_t id[static 8],
                                 const uint8_t hash[static CM_DIGEST_BYTES], const char *name,
                                 int64_t expires_unix_s, const char *adapters, struct cm_error *err)
{
    sqlite3_stmt *insert = NULL;
    bool good = sqlite3_exec(store->db, "BEGIN IMMEDIATE", NULL, NULL, NULL) == SQLITE_OK &&
                sqlite3_prepare_v2(store->db,
                                   "INSERT INTO keys (id, hash, name, created_unix_s, "
                                   "expires_unix_s, adapters) VALUES (?, ?, ?, ?, ?, ?)",
                                   -1, &insert, NULL) == SQLITE_OK;
    if (good) {
        sqlite3_bind_blob(insert, 1, id, 8, SQLITE_STATIC);
        sqlite3_bind_blob(insert, 2, hash, CM_DIGEST_BYTES, SQLITE_STATIC);
        sqlite3_bind_text(insert, 3, name, -1, SQLITE_STATIC);
        sqlite3_bind_int64(insert, 4, time(NULL));
        sqlite3_bind_int64(insert, 5, expires_unix_s);
        sqlite3_bind_text(insert, 6, adapters, -1, SQLITE_STATIC);
        good = sqlite3_step(insert) == SQLITE_DONE;
    }
    sqlite3_finalize(insert);
    good = good && sqlite3_exec(store->db, "UPDATE meta SET generation = generation + 1; COMMIT",
                                NULL, NULL, NULL) == SQLITE_OK;
    return good ? CM_OK : database_refuse(store, "add a key", err);
}

enum cm_status key_store_add(struct key_store *store, const char *name, int64_t expires_unix_s,
                             const char *adapters, char ret_text[static CLI_KEY_TEXT_BYTES],
                             struct cm_error *err)
{
    uint8_t random[8 + 32 + 1] = {0}; /* one more: base64url looks a byte ahead */
    uint8_t hash[CM_DIGEST_BYTES];
    char id[17];
    char secret[44];
    if (integer_query(store, "SELECT count(*) FROM keys WHERE revoked_unix_s = 0") >=
        CM_API_KEYS_MAX) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CLI-KEYS",
                            "there are already %d keys; revoke some", CM_API_KEYS_MAX);
    }
    if (getrandom(random, 40, 0) != 40) {
        return cm_error_errno(err, errno, "CM-CLI-RANDOM", "no random bytes");
    }
    cm_hex_write(random, 8, id);
    base64url(random + 8, secret);
    snprintf(ret_text, CLI_KEY_TEXT_BYTES, "cm-%s-%s", id, secret);
    enum cm_status status = grants_check(adapters, err);
    if (status == CM_OK && !hash_make(ret_text, hash)) {
        status = cm_error_set(err, CM_E_BUG, "CM-CLI-HASH", "SHA-256 failed");
    }
    if (status == CM_OK) {
        status = key_insert(store, random, hash, name, expires_unix_s, adapters, err);
    }
    cm_wipe(random, sizeof(random));
    cm_wipe(secret, sizeof(secret));
    return status == CM_OK ? key_store_publish(store, err) : status;
}

/* `sql` sets the one value of the one valid key of this id. */
static enum cm_status key_change(struct key_store *store, const char *sql, const char *value,
                                 const char *id, struct cm_error *err)
{
    sqlite3_stmt *update = NULL;
    int changed = 0;
    bool good = sqlite3_exec(store->db, "BEGIN IMMEDIATE", NULL, NULL, NULL) == SQLITE_OK &&
                sqlite3_prepare_v2(store->db, sql, -1, &update, NULL) == SQLITE_OK;
    if (good) {
        sqlite3_bind_text(update, 1, value, -1, SQLITE_STATIC);
        sqlite3_bind_text(update, 2, id, -1, SQLITE_STATIC);
        good = sqlite3_step(update) == SQLITE_DONE;
        changed = sqlite3_changes(store->db);
    }
    sqlite3_finalize(update);
    good = good && sqlite3_exec(store->db, "UPDATE meta SET generation = generation + 1; COMMIT",
                                NULL, NULL, NULL) == SQLITE_OK;
    if (!good) {
        return database_refuse(store, "change", err);
    }
    if (changed == 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-KEYS",
                            "no valid key has the id \"%.32s\"; `casemate keys list` shows them",
                            id);
    }
    return key_store_publish(store, err);
}

enum cm_status key_store_revoke(struct key_store *store, const char *id, struct cm_error *err)
{
    char now[24];
    snprintf(now, sizeof(now), "%lld", (long long)time(NULL));
    return key_change(
        store,
        "UPDATE keys SET revoked_unix_s = CAST(? AS INTEGER) WHERE lower(hex(id)) = ? "
        "AND revoked_unix_s = 0",
        now, id, err);
}

enum cm_status key_store_grant(struct key_store *store, const char *id, const char *adapters,
                               struct cm_error *err)
{
    enum cm_status status = grants_check(adapters, err);
    return status == CM_OK ? key_change(store,
                                        "UPDATE keys SET adapters = ? WHERE lower(hex(id)) = ? "
                                        "AND revoked_unix_s = 0",
                                        adapters, id, err)
                           : status;
}

enum cm_status key_store_list(struct key_store *store,
                              void (*each)(void *context, const struct key_entry *entry),
                              void *context, struct cm_error *err)
{
    sqlite3_stmt *query = NULL;
    int step;
    if (sqlite3_prepare_v2(store->db,
                           "SELECT lower(hex(id)), name, created_unix_s, expires_unix_s, "
                           "revoked_unix_s, adapters FROM keys ORDER BY created_unix_s, id",
                           -1, &query, NULL) != SQLITE_OK) {
        return database_refuse(store, "read", err);
    }
    while ((step = sqlite3_step(query)) == SQLITE_ROW) {
        struct key_entry entry = {.created_unix_s = sqlite3_column_int64(query, 2),
                                  .expires_unix_s = sqlite3_column_int64(query, 3),
                                  .revoked_unix_s = sqlite3_column_int64(query, 4),
                                  .adapters = (const char *)sqlite3_column_text(query, 5)};
        snprintf(entry.id, sizeof(entry.id), "%s", (const char *)sqlite3_column_text(query, 0));
        snprintf(entry.name, sizeof(entry.name), "%s", (const char *)sqlite3_column_text(query, 1));
        each(context, &entry);
    }
    sqlite3_finalize(query);
    return step == SQLITE_DONE ? CM_OK : database_refuse(store, "read", err);
}
