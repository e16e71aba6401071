// A ranking as a list with a place for each answer: 1 is best, equal places are ties, 0 is "cannot judge", null is not
// placed yet. All functions are pure.

export const LETTERS = "ABCDEFGHIJKL";
const ENDINGS = ["th", "st", "nd", "rd"];

export const blank = (size) => Array(size).fill(null);
export const ordinal = (n) => `${n}${n > 3 ? "th" : ENDINGS[n]}`;
const isPlaced = (place) => place !== null && place > 0;
const set = (places, i, place) => places.map((old, j) => (i === j ? place : old));

/** The places in order, each once, with their answers: [{place, members}]. */
export function groups(places) {
  const numbers = [...new Set(places.filter(isPlaced))].sort((a, b) => a - b);
  return numbers.map((place) => ({ place, members: places.flatMap((one, i) => (one === place ? [i] : [])) }));
}

/** The same order with places 1, 2, 3, … without a gap. */
export function dense(places) {
  const order = groups(places).map((group) => group.place);
  return places.map((place) => (isPlaced(place) ? order.indexOf(place) + 1 : place));
}

const complete = (places) => (places.includes(null) ? places : dense(places));

/** Give answer `i` a place, beside those that have it. */
export const put = (places, i, place) => complete(set(places, i, place));
export const cannotJudge = (places, i) => complete(set(places, i, 0));
export const clear = (places, i) => set(places, i, null);

/** Give answer `i` the place behind the last. */
export function append(places, i) {
  const rest = set(places, i, null);
  const packed = Math.max(0, ...rest) + 1 > places.length ? dense(rest) : rest;
  return complete(set(packed, i, Math.max(0, ...packed) + 1));
}

/** Give answer `i` a place of its own before the group at `place`. */
export function insertBefore(places, i, place) {
  const shifted = set(places, i, null).map((one) => (isPlaced(one) && one >= place ? one + 1 : one));
  return dense(set(shifted, i, place));
}

/** Move answer `i` one step up (-1) or down (+1): out of a tie, or into the next group. */
export function step(places, i, direction) {
  if (!isPlaced(places[i])) return direction < 0 || places[i] === null ? append(places, i) : places;
  const packed = dense(places);
  const tied = packed.filter((place) => place === packed[i]).length > 1;
  if (tied) return insertBefore(packed, i, packed[i] + (direction > 0 ? 1 : 0));
  const next = packed[i] + direction;
  return packed.includes(next) && next > 0 ? dense(set(packed, i, next)) : packed;
}

/** Where answer `i` is, in words. */
export function describe(places, i) {
  if (places[i] === null) return "not placed";
  if (places[i] === 0) return "cannot judge";
  const others = places.flatMap((place, j) => (place === places[i] && j !== i ? [LETTERS[j]] : []));
  return ordinal(places[i]) + (others.length ? `, tied with ${others.join(" and ")}` : "");
}

/** What keeps the ranking from being saved, in words; "" where nothing does. */
export function missing(places) {
  const left = places.flatMap((place, i) => (place === null ? [LETTERS[i]] : []));
  if (left.length) return left.length === places.length ? "Place the answers to save." : `${left.join(", ")} to place.`;
  if (places.filter(isPlaced).length < 2) return "Rank two answers or more, or skip the item.";
  return "";
}

/** The ranks as the server takes them: null for "cannot judge". */
export const toRanks = (places) => dense(places).map((place) => (place === 0 ? null : place));
export const fromRanks = (ranks) => ranks.map((rank) => (rank === null ? 0 : rank));
