// Numbers, times and elements: how the page says things. Data gets into the page as text alone, never as markup.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const DIGITS_MAX = 9; // of a value: enough for a latitude to a centimetre, too few for the noise of binary fractions
const DECIMALS_MAX = 7;

export const whole = (number) => WHOLE.format(number);

export function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(count >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${count} B`;
}

export function duration(seconds) {
  for (const [unit, length] of [["days", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
}

export function rate(perSecond) {
  return perSecond === null ? "" : perSecond < 99.95 ? perSecond.toFixed(1) : whole(perSecond);
}

const two = (number) => String(number).padStart(2, "0");

// An instant, in milliseconds since 1970, by the browser's time zone.
export function clock(ms) {
  const at = new Date(ms);
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

// The decimals that a number has, as far as they mean anything.
export function decimalsOf(number) {
  const [digits, exponent] = Math.abs(number).toPrecision(DIGITS_MAX).split("e");
  if (exponent) return 0;
  const decimals = digits.includes(".") ? digits.replace(/0+$/, "").split(".")[1].length : 0;
  return Math.min(decimals, DECIMALS_MAX);
}

// A number with so many decimals; a very large or small one as a power of ten.
export function decimal(number, decimals) {
  const size = Math.abs(number);
  if (size >= 1e12 || (size > 0 && size < 1e-6)) return number.toExponential(4);
  const fit = Math.max(0, Math.min(decimals, DIGITS_MAX - 1 - Math.floor(Math.log10(Math.max(size, 1)))));
  const text = number.toFixed(fit);
  return Number(text) === 0 ? text.replace("-", "") : text; // There is no minus zero for drivers.
}

// An element with properties and children: texts and elements.
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function svg(name, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Only what differs is written: most of the page stays as it is from one second to the next.
export function write(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

export function mark(place, state) {
  if (place.dataset.state !== state) place.dataset.state = state;
}

// What the browser keeps of the viewer's choices, if it lets us.
export const kept = {
  read(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`ingestd.${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`ingestd.${name}`, JSON.stringify(value));
    } catch {
      // A private window keeps nothing.
    }
  },
};
