// Charts over time, drawn by hand: a few lines of SVG, a readout that follows pointer and arrow keys, and the same figures as a
// table for who does not see them.

import { useEffect, useRef, useState } from "preact/hooks";
import type { TargetedKeyboardEvent, TargetedPointerEvent } from "preact";

export interface Series {
  name: string;
  tone: string;
  // One value for each point; null where there is nothing to say.
  values: (number | null)[];
  fill?: boolean;
}

interface Props {
  title: string;
  times: string[];
  series: Series[];
  top?: number;
  // Powers of ten at equal distances: for what differs by orders of magnitude.
  log?: boolean;
  show: (value: number) => string;
  empty: string;
}

const HEIGHT = 168;
const LEFT = 52;
const BOTTOM = 22;
const TOP = 8;

// A round number at or above `value`.
function ceiling(value: number): number {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value) ?? value;
}

export function Chart({ title, times, series, top, log, show, empty }: Props) {
  const box = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(560);
  const [at, setAt] = useState<number | null>(null);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.max(240, entry.contentRect.width)));
    if (box.current) watch.observe(box.current);
    return () => watch.disconnect();
  }, []);

  const known = series.flatMap((one) => one.values.filter((value) => value !== null));
  const [least, most] = known.length > 0 ? [Math.min(...known), Math.max(...known)] : [1, 100];
  const bottom = log ? Math.floor(Math.log10(Math.max(least, 0.1))) : 0;
  const highest = log ? Math.max(bottom + 1, Math.ceil(Math.log10(Math.max(most, 0.1)))) : (top ?? ceiling(most));
  const ticks = log
    ? Array.from({ length: highest - bottom + 1 }, (_, at) => 10 ** (bottom + at))
    : [0, highest / 2, highest];
  const count = times.length;
  const x = (index: number) => LEFT + ((width - LEFT - 8) * (index + 0.5)) / Math.max(1, count);
  const y = (value: number) => {
    const at = log ? Math.log10(Math.max(value, 10 ** bottom)) : value;
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (Math.min(at, highest) - bottom) / (highest - bottom));
  };
  const point = at === null || at >= count ? null : at;

  const move = (event: TargetedPointerEvent<HTMLDivElement>) => {
    const from = event.currentTarget.getBoundingClientRect().left;
    const index = Math.floor(((event.clientX - from - LEFT) / (width - LEFT - 8)) * count);
    setAt(index >= 0 && index < count ? index : null);
  };
  const step = (event: TargetedKeyboardEvent<HTMLDivElement>) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -count, End: count }[event.key];
    if (event.key === "Escape") setAt(null);
    if (by === undefined || count === 0) return;
    event.preventDefault();
    setAt(Math.min(count - 1, Math.max(0, (at ?? count) + by)));
  };

  const readout =
    point === null
      ? null
      : `${times[point]}: ${series
          .map((one) => `${one.name} ${one.values[point] === null ? "–" : show(one.values[point]!)}`)
          .join(", ")}`;
  const spread = width < 420 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
  // Of few points some have one time, and each is written once.
  const labels = (count === 0 ? [] : spread.map((part) => Math.round(part * (count - 1)))).filter(
    (index, place, all) => place === 0 || times[index] !== times[all[place - 1]],
  );

  return (
    <figure class="chart">
      <figcaption>
        <span class="keys">
          {series.map((one) => (
            <span key={one.name}>
              <i style={`background: var(--${one.tone})`} />
              {one.name}
              <b>{point === null || one.values[point] === null ? "" : show(one.values[point]!)}</b>
            </span>
          ))}
        </span>
        <span class="when">{point === null ? "" : times[point]}</span>
      </figcaption>
      <div
        ref={box}
        class="plot"
        tabIndex={0}
        role="img"
        aria-label={`${title}. ${known.length === 0 ? empty : "Arrow keys read it step by step."}`}
        onPointerMove={move}
        onPointerLeave={() => setAt(null)}
        onKeyDown={step}
        onBlur={() => setAt(null)}
      >
        <svg width={width} height={HEIGHT} aria-hidden="true">
          {ticks.map((tick) => (
            <g key={tick}>
              <line class="grid" x1={LEFT} x2={width - 8} y1={y(tick)} y2={y(tick)} />
              <text x={LEFT - 8} y={y(tick) + 4} text-anchor="end">
                {known.length > 0 || top ? show(tick) : ""}
              </text>
            </g>
          ))}
          {labels.map((index, place) => (
            <text
              key={index}
              x={x(index)}
              y={HEIGHT - 5}
              text-anchor={labels.length === 1 ? "middle" : place === 0 ? "start" : place === labels.length - 1 ? "end" : "middle"}
            >
              {times[index]}
            </text>
          ))}
          {series.map((one) => {
            const runs: [number, number][][] = [];
            one.values.forEach((value, index) => {
              if (value === null) return;
              if (index === 0 || one.values[index - 1] === null) runs.push([]);
              runs[runs.length - 1].push([x(index), y(value)]);
            });
            return runs.map((run) => {
              const path = run.map(([px, py], index) => `${index ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
              const tone = `var(--${one.tone})`;
              return (
                <g key={run[0][0]}>
                  {one.fill && run.length > 1 && (
                    <path d={`${path}L${run[run.length - 1][0]} ${HEIGHT - BOTTOM}L${run[0][0]} ${HEIGHT - BOTTOM}Z`} fill={tone} opacity="0.14" />
                  )}
                  <path d={path} fill="none" stroke={tone} stroke-width="2" stroke-linejoin="round" />
                  {run.length === 1 && <circle cx={run[0][0]} cy={run[0][1]} r="2.5" fill={tone} />}
                </g>
              );
            });
          })}
          {point !== null && <line class="cross" x1={x(point)} x2={x(point)} y1={TOP} y2={HEIGHT - BOTTOM} />}
          {point !== null &&
            series.map((one) =>
              one.values[point] === null ? null : (
                <circle key={one.name} cx={x(point)} cy={y(one.values[point]!)} r="4" fill={`var(--${one.tone})`} />
              ),
            )}
        </svg>
        {known.length === 0 && <p class="nothing">{empty}</p>}
      </div>
      <p class="spoken" aria-live="polite">
        {readout}
      </p>
    </figure>
  );
}
