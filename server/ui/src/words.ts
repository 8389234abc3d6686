// Figures as people read them.

const decimal = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function scaled(value: number, step: number, units: string[]): string {
  let at = 0;
  while (Math.abs(value) >= step * 0.9995 && at < units.length - 1) {
    value /= step;
    at += 1;
  }
  const text = at === 0 || value >= 100 ? whole.format(value) : decimal.format(value);
  return `${text} ${units[at]}`.trim();
}

export const bytes = (value: number) => scaled(value, 1000, ["B", "kB", "MB", "GB", "TB", "PB"]);
export const count = (value: number) =>
  value < 10_000 ? whole.format(value) : scaled(value, 1000, ["", "k", "M", "bn", "tn"]);
const cents = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
// What is less than a cent is not nothing.
export const money = (value: number) =>
  value !== 0 && Math.abs(value) < 0.005 ? (value > 0 ? "< 0.01" : "> -0.01") : cents.format(value);
export const exact = (value: number) => whole.format(value);

export function percent(part: number, of: number): string {
  if (of === 0) return "–";
  const value = (100 * part) / of;
  if (value > 99.9 && part < of) return "99.9 %";
  return `${value >= 99.95 || value === 0 ? whole.format(value) : decimal.format(value)} %`;
}

export function millis(value: number | null): string {
  if (value === null) return "–";
  if (value < 1) return "< 1 ms";
  return value < 1000 ? `${whole.format(value)} ms` : `${decimal.format(value / 1000)} s`;
}

export function span(seconds: number): string {
  if (seconds < 60) return `${whole.format(Math.floor(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 48 * 3600) {
    const hours = Math.floor(seconds / 3600);
    const minutes = Math.floor((seconds % 3600) / 60);
    return minutes && hours < 10 ? `${hours} h ${minutes} min` : `${hours} h`;
  }
  return `${Math.floor(seconds / 86400)} days`;
}

export function clock(at_ms: number, withDay: boolean): string {
  const time = new Date(at_ms);
  const hours = time.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  return withDay ? `${time.toLocaleDateString("en-GB", { weekday: "short" })} ${hours}` : hours;
}

export const plural = (n: number, one: string, many = `${one}s`) => `${exact(n)} ${n === 1 ? one : many}`;
