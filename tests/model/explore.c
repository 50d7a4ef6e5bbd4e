// Visits every state of a model that compiled.py has put into C, as explore.py does in Python. A state is packed into WORDS words;
// the states lie one behind the other in one array, and an open-addressing table of their numbers finds them. Whole states are
// compared, so two never count as one.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

static int broken;  // a property did not hold in the step that was just taken
#include "model.h"  // the model: its steps, and how large everything is

enum { DONE, BROKEN, RESTS_BADLY, STUCK, TOO_LARGE_A_VALUE, TOO_MANY };

typedef struct {
    u32 *parents;
    u64 num_states, num_steps;
    u64 here;  // where the outcome was found
} Found;

typedef struct {
    u64 (*packed)[WORDS];
    u32 *parents;
    u8 *num_after;  // how many steps each state has
    u8 *good;       // whether a good end can be reached from it
    u64 count, room;
    u32 *after;  // where these steps lead, one state's behind the other's
    u64 num_after_all, room_after;
    u32 *table;  // numbers of states, plus one
    u64 mask;
} States;

static u64 hash_of(const u64 *w) {
    u64 hash = 0;
    for (int i = 0; i < WORDS; i++) {
        hash = (hash ^ w[i]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    return hash * 0xBF58476D1CE4E5B9u >> 16;
}

static int grow_table(States *all) {
    u64 size = all->mask ? 2 * (all->mask + 1) : 1 << 16;
    u32 *table = calloc(size, sizeof *table);
    if (!table) return 0;
    free(all->table);
    all->table = table;
    all->mask = size - 1;
    for (u64 i = 0; i < all->count; i++) {
        u64 at = hash_of(all->packed[i]) & all->mask;
        while (table[at]) at = (at + 1) & all->mask;
        table[at] = (u32)i + 1;
    }
    return 1;
}

static int make_room(States *all, u64 after) {
    if (all->count == all->room) {
        all->room = all->room ? 2 * all->room : 1 << 16;
        all->packed = realloc(all->packed, all->room * sizeof *all->packed);
        all->parents = realloc(all->parents, all->room * sizeof *all->parents);
        all->num_after = realloc(all->num_after, all->room);
        all->good = realloc(all->good, all->room);
        if (!all->packed || !all->parents || !all->num_after || !all->good || all->room >> 32) return 0;
    }
    if (all->num_after_all + after > all->room_after) {
        all->room_after = all->room_after ? 2 * all->room_after : 1 << 18;
        all->after = realloc(all->after, all->room_after * sizeof *all->after);
        if (!all->after) return 0;
    }
    return 2 * all->count < all->mask || grow_table(all);
}

// The number of a state, which is new if it was not found.
static u32 find(States *all, const u64 *w, u64 hash) {
    for (u64 at = hash & all->mask;; at = (at + 1) & all->mask) {
        u32 number = all->table[at];
        if (!number) {
            all->table[at] = (u32)all->count + 1;
            memcpy(all->packed[all->count], w, sizeof *all->packed);
            return (u32)all->count++;
        }
        if (!memcmp(all->packed[number - 1], w, sizeof *all->packed)) return number - 1;
    }
}

// A step, and what is private then, of the movers from `first` to `end`. False if it cannot happen, or a property does not hold.
static int take(const Step *step, u8 *s, int first, int end) {
    int taken = step->take(s);
    for (int again = 1; again;) {
        again = 0;
        for (int m = first; taken && m < end; m++)
            for (const Row *row; !broken && (row = &ROWS[m][s[PC_AT[m]]])->is_private[!s[FAULTS_AT]];) {
                row->steps[0].take(s);
                again = 1;
            }
    }
    return taken && !broken;
}

typedef struct {
    u64 w[WORDS];
    u64 hash;
    u8 is_done;
} After;

static int arrive(const States *all, u8 *s, After *after) {
    normalise(s);
    if (!pack(s, after->w)) return 0;
    after->is_done = is_done(s);
    after->hash = hash_of(after->w);
    __builtin_prefetch(&all->table[after->hash & all->mask]);
    return 1;
}

// All steps from the state with number `here`. Returns the outcome.
static int take_all(States *all, u64 here) {
    u8 from[NBYTES], s[NBYTES];
    After after[MAX_AFTER];
    int count = 0, is_at_rest = 1;
    unpack(all->packed[here], from);
    broken = 0;
    for (int m = 0; m < NUM_MOVERS; m++) {
        const Row *row = &ROWS[m][from[PC_AT[m]]];
        for (int i = 0; i < row->count; i++) {
            memcpy(s, from, NBYTES);
            int taken = take(&row->steps[i], s, m, m + 1);
            if (broken) return BROKEN;
            if (!taken) continue;
            is_at_rest &= row->steps[i].by_user;
            if (!arrive(all, s, &after[count++])) return TOO_LARGE_A_VALUE;
        }
    }
    for (int i = 0; from[FAULTS_AT] && i < NUM_FAULTS; i++) {
        memcpy(s, from, NBYTES);
        int taken = take(&FAULTS[i], s, 0, NUM_MOVERS);
        if (broken) return BROKEN;
        if (!taken) continue;
        if (!arrive(all, s, &after[count++])) return TOO_LARGE_A_VALUE;
    }
    if (MUST_REST_WELL && is_at_rest) {
        check_rest(from);
        if (broken) return RESTS_BADLY;
    }
    for (int i = 0; i < count; i++) {  // all their cache misses at once
        u32 number = all->table[after[i].hash & all->mask];
        if (number) __builtin_prefetch(&all->packed[number - 1]);
    }
    for (int i = 0; i < count; i++) {
        if (!make_room(all, count)) return TOO_MANY;
        u64 before = all->count;
        u32 there = find(all, after[i].w, after[i].hash);
        if (there == before) {
            all->parents[there] = (u32)here;
            all->good[there] = after[i].is_done;
        }
        all->after[all->num_after_all++] = there;
    }
    all->num_after[here] = (u8)count;
    return DONE;
}

// The first state from which no good one can be reached, or their number.
static u64 stuck(States *all) {
    for (int changed = 1; changed;) {
        changed = 0;
        const u32 *after = all->after + all->num_after_all;
        for (u64 here = all->count; here--;) {
            after -= all->num_after[here];
            for (int i = 0; !all->good[here] && i < all->num_after[here]; i++)
                if (all->good[after[i]]) all->good[here] = changed = 1;
        }
    }
    u64 here = 0;
    while (here < all->count && all->good[here]) here++;
    return here;
}

static States all;

int explore(const u8 *initial, Found *found) {
    u8 s[NBYTES];
    After first;
    int outcome = TOO_MANY;
    if (make_room(&all, 1)) {
        memcpy(s, initial, NBYTES);
        outcome = arrive(&all, s, &first) ? DONE : TOO_LARGE_A_VALUE;
    }
    if (outcome == DONE) {
        all.good[find(&all, first.w, first.hash)] = first.is_done;
        for (found->here = 0; found->here < all.count; found->here++) {
            outcome = take_all(&all, found->here);
            if (outcome != DONE) break;
        }
    }
    if (outcome == DONE && (found->here = stuck(&all)) < all.count) outcome = STUCK;
    found->parents = all.parents;
    found->num_states = all.count;
    found->num_steps = all.num_after_all;
    return outcome;
}

void state(u64 number, u8 *s) { unpack(all.packed[number], s); }

void discard(void) {
    free(all.packed), free(all.parents), free(all.num_after), free(all.good), free(all.after), free(all.table);
    memset(&all, 0, sizeof all);
}
