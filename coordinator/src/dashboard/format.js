// @ts-check
// Figures as words. Pure: no page, no clock. An unknown figure (null) is shown as a dash.

export const UNKNOWN = "–";
const SPACE = "\u00a0"; // a figure and its unit stay on one line

/** @param {number | null | undefined} value @param {number} [digits] */
export function number(value, digits = 1) {
  if (value === null || value === undefined) return UNKNOWN;
  if (value === 0) return "0";
  return value >= 100 ? value.toFixed(0) : value.toFixed(digits);
}

/** @param {number | null | undefined} value */
export function bytes(value) {
  if (value === null || value === undefined) return UNKNOWN;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let size = value;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 || size >= 100 ? size.toFixed(0) : size.toFixed(1)}${SPACE}${units[unit]}`;
}

/** A step or another short time. @param {number | null | undefined} seconds */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return UNKNOWN;
  if (seconds < 0.001) return `${(seconds * 1e6).toFixed(0)}${SPACE}µs`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 0.1 ? 1 : 0)}${SPACE}ms`;
  return `${seconds.toFixed(2)}${SPACE}s`;
}

/** A time since something. @param {number | null | undefined} seconds */
export function age(seconds) {
  if (seconds === null || seconds === undefined) return UNKNOWN;
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(1)}${SPACE}s`;
  if (seconds < 120) return `${Math.floor(seconds)}${SPACE}s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)}${SPACE}min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)}${SPACE}h`;
  return `${Math.floor(seconds / 86400)}${SPACE}d`;
}

/** Both ends inclusive, as people count. @param {[number, number] | null} span */
export function layers(span) {
  if (!span || span[1] <= span[0]) return "none";
  return span[1] - span[0] === 1 ? `${span[0]}` : `${span[0]}–${span[1] - 1}`;
}

/** Rounded down: 100 % is for what is complete. @param {number | null} ratio */
export function percent(ratio) {
  return ratio === null ? UNKNOWN : `${Math.floor(ratio * 100)}${SPACE}%`;
}

/** What a prediction came to; nothing while that is not known. @param {number | null | undefined} predicted @param {number | null | undefined} measured */
export function measured(predicted, measured) {
  if (!predicted || measured === null || measured === undefined) return "";
  const difference = Math.round(100 * (measured / predicted - 1));
  return `, measured ${number(measured)}, ${difference < 0 ? "−" : "+"}${Math.abs(difference)}${SPACE}%`;
}

/** @param {string} word */
export function capital(word) {
  return word.charAt(0).toUpperCase() + word.slice(1);
}
